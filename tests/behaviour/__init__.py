"""From outside: commands, the Python interface and notebooks as people use them, and hostile input of every kind."""
