-- What the migrations beside this file come to, for a new database. tests/test_migrations.py compares the two.

CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL,
    CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);

CREATE TABLE aibridge_interceptions (
    id TEXT NOT NULL,
    initiator_id TEXT NOT NULL,
    provider TEXT NOT NULL,
    provider_name TEXT NOT NULL,
    model TEXT,
    started_at TEXT NOT NULL,
    ended_at TEXT,
    status TEXT NOT NULL,
    http_status INTEGER,
    error TEXT,
    route TEXT NOT NULL,
    streaming BOOLEAN NOT NULL,
    time_to_first_byte_ms FLOAT,
    client TEXT,
    client_session_id TEXT,
    user_agent TEXT,
    correlating_tool_call_id TEXT,
    credential_kind TEXT,
    credential_hint TEXT,
    metadata TEXT NOT NULL,
    instance TEXT NOT NULL,
    PRIMARY KEY (id)
);
CREATE INDEX aibridge_interceptions_started_at ON aibridge_interceptions (started_at);
CREATE INDEX aibridge_interceptions_initiator ON aibridge_interceptions (initiator_id, started_at);
CREATE INDEX aibridge_interceptions_session ON aibridge_interceptions (client_session_id);
CREATE INDEX aibridge_interceptions_in_progress ON aibridge_interceptions (instance) WHERE status = 'in_progress';

CREATE TABLE aibridge_token_usages (
    id TEXT NOT NULL,
    interception_id TEXT NOT NULL,
    provider_response_id TEXT,
    input_tokens BIGINT,
    output_tokens BIGINT,
    cache_read_input_tokens BIGINT,
    cache_write_input_tokens BIGINT,
    completeness TEXT NOT NULL,
    metadata TEXT NOT NULL,
    created_at TEXT NOT NULL,
    PRIMARY KEY (id)
);
CREATE INDEX aibridge_token_usages_interception ON aibridge_token_usages (interception_id);

CREATE TABLE aibridge_user_prompts (
    id TEXT NOT NULL,
    interception_id TEXT NOT NULL,
    provider_response_id TEXT,
    prompt TEXT NOT NULL,
    metadata TEXT NOT NULL,
    created_at TEXT NOT NULL,
    PRIMARY KEY (id)
);
CREATE INDEX aibridge_user_prompts_interception ON aibridge_user_prompts (interception_id);

CREATE TABLE aibridge_tool_usages (
    id TEXT NOT NULL,
    interception_id TEXT NOT NULL,
    provider_response_id TEXT,
    tool_call_id TEXT,
    server_url TEXT,
    tool TEXT NOT NULL,
    input TEXT,
    injected BOOLEAN NOT NULL,
    invocation_error TEXT,
    metadata TEXT NOT NULL,
    created_at TEXT NOT NULL,
    PRIMARY KEY (id)
);
CREATE INDEX aibridge_tool_usages_interception ON aibridge_tool_usages (interception_id);

CREATE TABLE aibridge_model_thoughts (
    id TEXT NOT NULL,
    interception_id TEXT NOT NULL,
    content TEXT NOT NULL,
    metadata TEXT NOT NULL,
    created_at TEXT NOT NULL,
    PRIMARY KEY (id)
);
CREATE INDEX aibridge_model_thoughts_interception ON aibridge_model_thoughts (interception_id);

CREATE TABLE aibridge_hidden_turns (
    id TEXT NOT NULL,
    scope TEXT NOT NULL,
    keys TEXT NOT NULL,
    toolset TEXT NOT NULL,
    size BIGINT NOT NULL,
    created_at TEXT NOT NULL,
    used_at TEXT NOT NULL,
    last_id TEXT,
    data BLOB,
    PRIMARY KEY (id)
);
CREATE INDEX aibridge_hidden_turns_full ON aibridge_hidden_turns (used_at, size) WHERE size > 0;
CREATE INDEX aibridge_hidden_turns_empty ON aibridge_hidden_turns (used_at) WHERE size = 0;
CREATE INDEX aibridge_hidden_turns_toolset ON aibridge_hidden_turns (toolset);

CREATE TABLE aibridge_hidden_turn_keys (
    scope TEXT NOT NULL,
    "key" TEXT NOT NULL,
    turn TEXT NOT NULL,
    PRIMARY KEY (scope, "key")
) WITHOUT ROWID;

CREATE TABLE aibridge_toolsets (
    digest TEXT NOT NULL,
    used_at TEXT NOT NULL,
    tools BLOB NOT NULL,
    PRIMARY KEY (digest)
);

CREATE TABLE aibridge_mcp_tools (
    server TEXT NOT NULL,
    tool TEXT NOT NULL,
    digest TEXT NOT NULL,
    approved_at TEXT NOT NULL,
    PRIMARY KEY (server, tool)
);

INSERT INTO alembic_version (version_num) VALUES ('0002');
