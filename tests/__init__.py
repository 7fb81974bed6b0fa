"""What is promised, held against what happens. tests/README.md says what is where, and what helps to write another."""
