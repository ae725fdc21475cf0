"""Models leave as Hugging Face folders and come back from them, tensor by tensor."""
