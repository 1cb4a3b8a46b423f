"""``python -m slra report``: how far the attention of the user's own arrays can be compressed."""
