/* What a provider says in each of the three protocols, as C strings. Only provider.c includes it. */
#include <stdbool.h>
#include <stdio.h>

enum { EVENT_TEXT = 8, MAX_EVENT = 2048, MAX_TEXT = 1000000, MAX_DOCUMENT = MAX_TEXT + 2048 };

typedef enum { MESSAGES, CHAT, RESPONSES } protocol;

static char padding[MAX_TEXT + 1]; /* filler for texts */

#define CHAT_CHUNK "data: {\"id\":\"chatcmpl-mock\",\"object\":\"chat.completion.chunk\",\"created\":1700000000," \
  "\"model\":\"gpt-4o-2024-08-06\",\"system_fingerprint\":\"fp_1\",\"choices\":["
#define RESPONSE "\"id\":\"resp_mock\",\"object\":\"response\",\"created_at\":1700000000,\"model\":\"gpt-4o-2024-08-06\","

static const char *const first_events[][3] = {
  [MESSAGES] = {
    "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_01Mock\",\"type\":\"message\","
    "\"role\":\"assistant\",\"model\":\"claude-sonnet-4-5-20250929\",\"content\":[],\"stop_reason\":null,"
    "\"stop_sequence\":null,\"usage\":{\"input_tokens\":2095,\"cache_creation_input_tokens\":0,"
    "\"cache_read_input_tokens\":1024,\"output_tokens\":1,\"service_tier\":\"standard\"}}}\n\n",
    "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,"
    "\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n",
    "event: ping\ndata: {\"type\": \"ping\"}\n\n",
  },
  [CHAT] = {CHAT_CHUNK "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,"
            "\"finish_reason\":null}]}\n\n"},
  [RESPONSES] = {"event: response.created\ndata: {\"type\":\"response.created\",\"sequence_number\":0,\"response\":{"
                 RESPONSE "\"status\":\"in_progress\",\"output\":[],\"usage\":null}}\n\n"},
};

/* One text event with the time in nanoseconds; its length. */
static int format_event(protocol p, char *event, unsigned long time, long number) {
  switch (p) {
  case MESSAGES:
    return sprintf(event, "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,"
      "\"delta\":{\"type\":\"text_delta\",\"text\":\"ts=%019lu;%.*s\"}}\n\n", time, EVENT_TEXT, padding);
  case CHAT:
    return sprintf(event, CHAT_CHUNK "{\"index\":0,\"delta\":{\"content\":\"ts=%019lu;%.*s\"},\"logprobs\":null,"
      "\"finish_reason\":null}]}\n\n", time, EVENT_TEXT, padding);
  default:
    return sprintf(event, "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\","
      "\"sequence_number\":%ld,\"item_id\":\"msg_mock\",\"output_index\":0,\"content_index\":0,"
      "\"delta\":\"ts=%019lu;%.*s\"}\n\n", number, time, EVENT_TEXT, padding);
  }
}

/* The events behind the last text; their length. */
static int format_end(protocol p, char *events, long tokens, bool report_usage) {
  int length = 0;
  switch (p) {
  case MESSAGES:
    return sprintf(events, "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n"
      "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\","
      "\"stop_sequence\":null},\"usage\":{\"output_tokens\":%ld}}\n\n"
      "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n", tokens);
  case CHAT:
    length = sprintf(events, CHAT_CHUNK "{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\n");
    if (report_usage)
      length += sprintf(events + length, CHAT_CHUNK "],\"usage\":{\"prompt_tokens\":2095,\"completion_tokens\":%ld,"
        "\"total_tokens\":%ld}}\n\n", tokens, tokens + 2095);
    return length + sprintf(events + length, "data: [DONE]\n\n");
  default:
    return sprintf(events, "event: response.completed\ndata: {\"type\":\"response.completed\",\"sequence_number\":%ld,"
      "\"response\":{" RESPONSE "\"status\":\"completed\",\"output\":[{\"type\":\"message\",\"id\":\"msg_mock\","
      "\"status\":\"completed\",\"role\":\"assistant\",\"content\":[{\"type\":\"output_text\",\"text\":\"...\","
      "\"annotations\":[]}]}],\"usage\":{\"input_tokens\":2095,\"output_tokens\":%ld,\"total_tokens\":%ld}}}\n\n",
      tokens + 1, tokens, tokens + 2095);
  }
}

/* A whole answer with so many bytes of text; its length. */
static int format_document(protocol p, char *document, unsigned long time, int text) {
  switch (p) {
  case MESSAGES:
    return sprintf(document, "{\"id\":\"msg_01Mock\",\"type\":\"message\",\"role\":\"assistant\",\"model\":"
      "\"claude-sonnet-4-5-20250929\",\"content\":[{\"type\":\"text\",\"text\":\"ts=%019lu;%.*s\"}],\"stop_reason\":"
      "\"end_turn\",\"stop_sequence\":null,\"usage\":{\"input_tokens\":2095,\"cache_creation_input_tokens\":0,"
      "\"cache_read_input_tokens\":1024,\"output_tokens\":503,\"service_tier\":\"standard\"}}", time, text, padding);
  case CHAT:
    return sprintf(document, "{\"id\":\"chatcmpl-mock\",\"object\":\"chat.completion\",\"created\":1700000000,"
      "\"model\":\"gpt-4o-2024-08-06\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
      "\"ts=%019lu;%.*s\",\"refusal\":null},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":"
      "2095,\"completion_tokens\":503,\"total_tokens\":2598},\"system_fingerprint\":\"fp_1\"}", time, text, padding);
  default:
    return sprintf(document, "{" RESPONSE "\"status\":\"completed\",\"output\":[{\"type\":\"message\",\"id\":"
      "\"msg_mock\",\"status\":\"completed\",\"role\":\"assistant\",\"content\":[{\"type\":\"output_text\",\"text\":"
      "\"ts=%019lu;%.*s\",\"annotations\":[]}]}],\"usage\":{\"input_tokens\":2095,\"output_tokens\":503,"
      "\"total_tokens\":2598}}", time, text, padding);
  }
}
