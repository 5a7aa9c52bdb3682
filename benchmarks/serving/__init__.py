"""What `mnemoc serve` takes and withstands: each file measures a server in a process of its own."""
