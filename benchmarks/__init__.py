"""Measurements that anyone can run again; see NOTES.md for what was tried and results/ for what came out."""
