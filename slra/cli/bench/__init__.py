"""``python -m slra bench``: what slra takes beside what else there is, on the user's own machine."""
