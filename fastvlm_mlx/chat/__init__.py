"""Conversations: questions and answers that build on each other, and the file they are kept in.

Enters: an `Engine`, questions with pictures, a transcript.
Leaves: answers that cost their own tokens only; a transcript.
May import: errors, files, inputs, decoding.
"""
