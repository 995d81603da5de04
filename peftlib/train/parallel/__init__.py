"""One run on several processes, a GPU each: the process group, and what its members tell each other."""
