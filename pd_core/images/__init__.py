"""From a source's URI to decoded pixels: sources are listed, their files read, and what strangers made decoded."""
