"""A fast backend for lm-eval: batches, log-likelihood, decoding."""
