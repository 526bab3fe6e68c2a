"""What the gateway costs, measured beside a bare reverse proxy and beside other gateways: ``python -m benchmarks``.

The words used here:

*subject*: a program under measurement, a gateway or nginx, that stands between the load and the provider.
*provider*: the scripted AI provider (tools/provider.c). *load*: the client that makes requests (tools/load.c).
*measurement*: one thing done to a subject, which gives one number or a few, each for a *row* of the table.
*round*: every measurement done to every subject once, in turn. A row shows medians over the rounds, and its ratio to
nginx is the median of the rounds' ratios: what disturbs a round disturbs both.

README.md in this folder says what each row means and how it is taken.
"""
