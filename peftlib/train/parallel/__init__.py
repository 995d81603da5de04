"""One run on several processes with a GPU each: the process group, and communication between its members."""
