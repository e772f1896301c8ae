"""Files on this machine: the one reader of strangers' small files, the one writer of ours."""
