"""Train, evaluate, stop and resume with the Hugging Face Trainer."""
