"""Sequences longer than one pass can hold: exact chunked backpropagation and its companions."""
