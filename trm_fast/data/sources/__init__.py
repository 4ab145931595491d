"""Where data comes from: files of rows and pairs, the official layout, the hub."""
