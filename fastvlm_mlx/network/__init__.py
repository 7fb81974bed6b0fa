"""The model, in the order of the data: tower, projector, decoder.

Enters: pixels, token ids, a `ModelConfig`.
Leaves: image embeddings, hidden states, logits.
May import: config, backend, quantize, inputs.
"""
