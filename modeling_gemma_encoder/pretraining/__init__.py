"""Text for pretraining and up-training: documents, and the blocks of tokens made of them."""
