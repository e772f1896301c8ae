"""What `toy_stream` and `nla_lens` need to know of each other; neither imports this."""
