"""Clients that the tests of the server drive, and what others send."""
