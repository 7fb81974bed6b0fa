"""A folder of pictures, of any number -> an answer for each, written down so that nothing is lost and nothing is twice.

Enters: an engine; a folder, a pattern or a list; questions and rules for captions.
Leaves: texts beside the pictures, JSON lines or a CSV file, and a report.
May import: errors, files, inputs, decoding.
"""
