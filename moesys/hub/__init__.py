"""Released models: weights in from Hugging Face's folders, and out again, in any layout."""
