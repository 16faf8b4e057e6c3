"""Training of Video-LLaMA on `transformers.Trainer`: data, optimisation, checkpoints and the command line."""
