"""The fault suite: what each fault costs the client and the ledger, with real processes. ``python -m tests.chaos``.

The words used here:

- a *fault* is one thing that goes wrong outside of the gateway: at a provider, a database, a clock, a client, a tool;
- a *scenario* brings one fault about and says what is *promised*; its run says what was *observed*: what the client saw,
  what the ledger says, what was lost. Both are an `Outcome`, and have to be the same;
- a *chapter* is scenarios that share a *stage*: the processes that they play on;
- a *scale* is how many clients, events and bytes there are. The suite of tests plays all scenarios on the small scale.

The table in docs/reliability.md is made of what was observed, and is not written by hand.
"""
