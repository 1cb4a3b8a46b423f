"""The command line. Needs the ``demo`` extra; nothing else in slra imports it."""
