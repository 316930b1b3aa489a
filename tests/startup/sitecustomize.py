"""What processes that tests start do first. Imports make a hundred thousand objects that stay, and collecting garbage
again and again meanwhile takes a fifth of their time."""

import gc

gc.set_threshold(100_000, 20, 100)
