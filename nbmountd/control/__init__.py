"""The control socket: one JSON object a line, the same structs on both ends."""
