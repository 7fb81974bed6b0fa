"""How `tiny` was made: its world of scenes, its questions, its tokenizer, and its export."""
