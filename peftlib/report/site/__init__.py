"""A study's results as a static page: no server, nothing loaded from elsewhere, no word of a model ever executed."""
