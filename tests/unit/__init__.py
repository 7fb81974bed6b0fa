"""One module of the package at a time, and how the repository is written: rooms, start-up, types of results, names."""
