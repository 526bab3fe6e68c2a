"""Injected tools: the hidden turns of conversations, the tools that they were offered, the tools that were approved.

`keys` is a JSON array. `data` comes last, so that what stands before it can be read without it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "aibridge_hidden_turns",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("keys", sa.Text, nullable=False),
        sa.Column("toolset", sa.Text, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.Column("used_at", sa.Text, nullable=False),
        sa.Column("last_id", sa.Text),
        sa.Column("data", sa.LargeBinary),
    )
    _create_partial_index("aibridge_hidden_turns_full", ["used_at", "size"], "size > 0")
    _create_partial_index("aibridge_hidden_turns_empty", ["used_at"], "size = 0")
    op.create_index("aibridge_hidden_turns_toolset", "aibridge_hidden_turns", ["toolset"])
    op.create_table(
        "aibridge_hidden_turn_keys",
        sa.Column("scope", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("turn", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "aibridge_toolsets",
        sa.Column("digest", sa.Text, primary_key=True),
        sa.Column("used_at", sa.Text, nullable=False),
        sa.Column("tools", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "aibridge_mcp_tools",
        sa.Column("server", sa.Text, primary_key=True),
        sa.Column("tool", sa.Text, primary_key=True),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("approved_at", sa.Text, nullable=False),
    )


def _create_partial_index(name: str, columns: list[str], where: str) -> None:
    """An index of the turns that housekeeping looks for: those that may lose their data, those that may go."""
    op.create_index(name, "aibridge_hidden_turns", columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
