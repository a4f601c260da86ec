"""Text to samples: sources of documents, tokenizers, the held-out split, and the tokens in training order.

The way of the data: a source yields documents, `division` says which are held out, a tokenizer turns
them into two flat arrays of tokens (`corpus`), and `samples` cuts these into sequences. Everything is
numpy; nothing here imports torch, and packages that take long to import are imported when used.
"""
