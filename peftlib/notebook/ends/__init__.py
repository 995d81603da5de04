"""Last cells of a notebook: talk to the result, copy it to Drive, publish it, convert it for Ollama."""


def off(why, command):
    """Print in a headless run why a cell does nothing, and the command that does its work; returns None."""
    print(f"off in a headless run, for {why}: `{command}` does it")
