"""A page that runs an exported pipeline in a browser: a folder for any server, and a server for one's own machine."""
