"""What `mnemoc serve` takes and withstands: each file here is one measurement of a server in a process of its own."""
