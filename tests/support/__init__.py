"""What the tests stand on: a scripted provider, a corpus of provider traffic, and real clients.

Nothing here imports the gateway: these are the two ends of the wire, and stay true whatever stands between them.
"""
