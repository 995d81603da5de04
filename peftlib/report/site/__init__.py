"""A study's results as a static page: no server, no external resources, and model output is never executed."""
