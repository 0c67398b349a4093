"""What every room may use: errors, text, files, storage, untrusted input, redaction."""
