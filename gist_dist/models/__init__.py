"""Student and guide around SentenceTransformer, their tokenizer, and the guide cache."""
