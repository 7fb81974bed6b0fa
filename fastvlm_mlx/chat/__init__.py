"""Conversations: questions and answers that build on each other, and the file they are saved in.

Enters: an `Engine`, questions with pictures, a saved transcript.
Leaves: answers, for which only new tokens are computed; a transcript.
May import: errors, files, inputs, decoding.
"""
