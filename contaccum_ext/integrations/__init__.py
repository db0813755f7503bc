"""Contrastive accumulation inside other libraries' training loops."""
