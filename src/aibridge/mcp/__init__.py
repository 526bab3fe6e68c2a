"""Injected tools from MCP servers, on the official `mcp` SDK.

A *server* (`McpServer`) is what the configuration says of one: where it is, what of it is offered, its limits. `McpProxy`
keeps one *connection* to each, puts what they list into a *catalog* (filters, names that models take, a stable order), and
runs calls. *Approvals* pin what a tool's definition was when it was first seen, so that a change does not go unnoticed.

Nothing is imported here: the SDK takes most of a second to load, which the settings alone should not cost.
"""
