"""The ledger: interceptions, token usages, prompts, tool usages, thoughts.

Times are ISO 8601 in UTC and JSON is text, so that the tables read the same with every tool.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "aibridge_interceptions",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("initiator_id", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("provider_name", sa.Text, nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("started_at", sa.Text, nullable=False),
        sa.Column("ended_at", sa.Text),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("http_status", sa.Integer),
        sa.Column("error", sa.Text),
        sa.Column("route", sa.Text, nullable=False),
        sa.Column("streaming", sa.Boolean, nullable=False),
        sa.Column("time_to_first_byte_ms", sa.Float),
        sa.Column("client", sa.Text),
        sa.Column("client_session_id", sa.Text),
        sa.Column("user_agent", sa.Text),
        sa.Column("correlating_tool_call_id", sa.Text),
        sa.Column("credential_kind", sa.Text),
        sa.Column("credential_hint", sa.Text),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("instance", sa.Text, nullable=False),
    )
    op.create_index("aibridge_interceptions_started_at", "aibridge_interceptions", ["started_at"])
    op.create_index("aibridge_interceptions_initiator", "aibridge_interceptions", ["initiator_id", "started_at"])
    op.create_index("aibridge_interceptions_session", "aibridge_interceptions", ["client_session_id"])
    op.create_index(
        "aibridge_interceptions_in_progress",
        "aibridge_interceptions",
        ["instance"],
        sqlite_where=sa.text("status = 'in_progress'"),
        postgresql_where=sa.text("status = 'in_progress'"),
    )
    _create_child(
        "aibridge_token_usages",
        sa.Column("provider_response_id", sa.Text),
        sa.Column("input_tokens", sa.BigInteger),
        sa.Column("output_tokens", sa.BigInteger),
        sa.Column("cache_read_input_tokens", sa.BigInteger),
        sa.Column("cache_write_input_tokens", sa.BigInteger),
        sa.Column("completeness", sa.Text, nullable=False),
    )
    _create_child(
        "aibridge_user_prompts",
        sa.Column("provider_response_id", sa.Text),
        sa.Column("prompt", sa.Text, nullable=False),
    )
    _create_child(
        "aibridge_tool_usages",
        sa.Column("provider_response_id", sa.Text),
        sa.Column("tool_call_id", sa.Text),
        sa.Column("server_url", sa.Text),
        sa.Column("tool", sa.Text, nullable=False),
        sa.Column("input", sa.Text),
        sa.Column("injected", sa.Boolean, nullable=False),
        sa.Column("invocation_error", sa.Text),
    )
    _create_child("aibridge_model_thoughts", sa.Column("content", sa.Text, nullable=False))


def _create_child(name: str, *columns: sa.Column[object]) -> None:
    """A table whose rows belong to an interception.

    No foreign key: each row is written as soon as it is known, and replaying a spool must not depend on another row.
    """
    op.create_table(
        name,
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("interception_id", sa.Text, nullable=False),
        *columns,
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
    )
    op.create_index(f"{name}_interception", name, ["interception_id"])
