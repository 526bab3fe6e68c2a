/* A scripted AI provider: one thread, epoll, HTTP/1.1 on 127.0.0.1, far faster than any gateway that is measured with it.
 *
 *   provider PORT
 *
 * A POST is answered in the protocol that its path ends with: /messages (Anthropic Messages), /chat/completions or
 * /responses (OpenAI); as a stream of server-sent events where the body has "stream":true, else as one JSON document.
 * A GET of /stats answers with the counters (connected and active: how many connections and streams there are), any other with a list of models.
 *
 * What is answered is scripted by a word in the body, wherever it stands (in the prompt, say), so that every gateway
 * passes it on. It begins with "mock-", has parts with a dash between, and ends at a quote or a blank: mock-n200-u1000.
 *
 *   n<N>  text events of a stream (200)
 *   u<U>  microseconds between two events, each then a write of its own; 0 sends all at once (0)
 *   d<D>  microseconds before the answer (0)
 *   j<J>  bytes of text in a JSON answer (1000)
 *   e<E>  answer with this HTTP status, and an error
 *   k     close the connection without an answer
 *   K     close it in the middle of the stream
 *
 * Each text begins with "ts=<19 digits>;", the monotonic clock in nanoseconds when it was written: a client on this
 * machine knows by it how long an event was under way (load.c).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "buffer.h"
#include "protocols.h"

enum { READ_SIZE = 65536, BURST_SIZE = 65536, LATE_NS = 50000000 };

typedef enum { READ_HEAD, READ_BODY, READ_CHUNKS, ANSWER } phase;

typedef struct {
  long events, interval_us, delay_us, text, status;
  bool refuse, cut;
} script;

typedef struct connection {
  int fd;
  bool closed, wants_write;
  struct connection *next_closed;
  buffer in, body, out;
  size_t written;        /* of out */
  phase phase;
  char method[8], path[256];
  size_t body_length;    /* as declared */
  bool keep_alive;
  protocol protocol;
  script script;
  bool streaming, ended; /* ended: all of the answer is in out */
  bool report_usage;     /* Chat: the client asked for it */
  long sent;             /* events */
  uint64_t due;          /* when the timer goes off, in nanoseconds */
  long slot;             /* in the heap of timers, -1 without one */
} connection;

static struct {
  unsigned long connected, requests, streams, active, aborted, events;
} stats;

static int poller;
static connection *closed_connections;

static uint64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* ---- timers: a binary heap, the earliest first ---- */

static connection **heap;
static long timers, heap_capacity;

static void place(connection *c, long slot) {
  heap[slot] = c;
  c->slot = slot;
}

static void sift_up(connection *c) {
  while (c->slot && heap[(c->slot - 1) / 2]->due > c->due) {
    long parent = (c->slot - 1) / 2, slot = c->slot;
    place(heap[parent], slot);
    place(c, parent);
  }
}

static void sift_down(connection *c) {
  for (;;) {
    long slot = c->slot, child = 2 * slot + 1;
    if (child >= timers) return;
    if (child + 1 < timers && heap[child + 1]->due < heap[child]->due) child++;
    if (heap[child]->due >= c->due) return;
    place(heap[child], slot);
    place(c, child);
  }
}

static void set_timer(connection *c, uint64_t due) {
  c->due = due;
  if (c->slot < 0) {
    if (timers == heap_capacity) {
      heap_capacity = heap_capacity ? heap_capacity * 2 : 1024;
      heap = realloc(heap, (size_t)heap_capacity * sizeof *heap);
      if (!heap) die("realloc");
    }
    place(c, timers++);
  }
  sift_up(c);
  sift_down(c);
}

static void cancel_timer(connection *c) {
  if (c->slot < 0) return;
  connection *last = heap[--timers];
  if (last != c) {
    place(last, c->slot);
    sift_up(last);
    sift_down(last);
  }
  c->slot = -1;
}

/* ---- connections ---- */

static void watch(connection *c, int operation, bool write) {
  struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | (write ? EPOLLOUT : 0), .data.ptr = c};
  epoll_ctl(poller, operation, c->fd, &event);
  c->wants_write = write;
}

static void end_stream(connection *c, bool aborted) {
  if (!c->streaming) return;
  c->streaming = false;
  stats.active--;
  stats.aborted += aborted;
}

/* It is freed when all events that epoll has reported were looked at: some may still name it. */
static void close_connection(connection *c) {
  if (c->closed) return;
  c->closed = true;
  stats.connected--;
  end_stream(c, true);
  cancel_timer(c);
  close(c->fd);
  c->next_closed = closed_connections;
  closed_connections = c;
}

static void free_closed(void) {
  while (closed_connections) {
    connection *c = closed_connections;
    closed_connections = c->next_closed;
    free(c->in.data);
    free(c->body.data);
    free(c->out.data);
    free(c);
  }
}

/* Write what is in out; whether all of it went. */
static bool flush(connection *c) {
  while (c->written < c->out.length) {
    ssize_t count = send(c->fd, c->out.data + c->written, c->out.length - c->written, MSG_NOSIGNAL);
    if (count < 0) {
      if (errno != EAGAIN) close_connection(c);
      else if (!c->wants_write) watch(c, EPOLL_CTL_MOD, true);
      return false;
    }
    c->written += (size_t)count;
  }
  c->written = c->out.length = 0;
  if (c->wants_write) watch(c, EPOLL_CTL_MOD, false);
  return true;
}

/* ---- what a stream is made of ---- */

static void append_chunk(connection *c, const char *data, int length) {
  char size[16];
  append(&c->out, size, (size_t)sprintf(size, "%x\r\n", (unsigned)length));
  append(&c->out, data, (size_t)length);
  append(&c->out, "\r\n", 2);
}

static void append_first_events(connection *c) {
  for (int i = 0; i < 3 && first_events[c->protocol][i]; i++)
    append_chunk(c, first_events[c->protocol][i], (int)strlen(first_events[c->protocol][i]));
}

static void append_event(connection *c) {
  char event[MAX_EVENT];
  c->sent++;
  stats.events++;
  append_chunk(c, event, format_event(c->protocol, event, now(), c->sent));
}

static void append_last_events(connection *c) {
  char events[MAX_EVENT];
  append_chunk(c, events, format_end(c->protocol, events, c->script.events, c->report_usage));
  append(&c->out, "0\r\n\r\n", 5);
  c->ended = true;
}

/* ---- answers ---- */

static void read_request(connection *c);

static void finish_if_written(connection *c) {
  if (!flush(c)) return;
  end_stream(c, false);
  if (!c->keep_alive) {
    close_connection(c);
    return;
  }
  c->phase = READ_HEAD;
  read_request(c); /* the next may have come already */
}

static bool cut_here(connection *c) {
  if (!c->script.cut || c->sent < c->script.events / 2) return false;
  flush(c);
  end_stream(c, false);
  close_connection(c);
  return true;
}

/* All events as fast as the gateway takes them: called again when it can take more. */
static void send_burst(connection *c) {
  long last = c->script.cut ? c->script.events / 2 : c->script.events;
  while (!c->ended) {
    while (c->sent < last && c->out.length - c->written < BURST_SIZE) append_event(c);
    if (cut_here(c)) return;
    if (c->sent == c->script.events) append_last_events(c);
    else if (!flush(c)) return;
  }
  finish_if_written(c);
}

/* One event in a write of its own; none for a reader so slow that the last one is still here. */
static void send_paced(connection *c) {
  if (cut_here(c)) return;
  if (c->sent == c->script.events) {
    cancel_timer(c);
    append_last_events(c);
    finish_if_written(c);
    return;
  }
  if (c->written == c->out.length) append_event(c);
  flush(c);
  if (c->closed) return;
  uint64_t time = now(), next = c->due + (uint64_t)c->script.interval_us * 1000;
  set_timer(c, next + LATE_NS < time ? time : next);
}

static void send_document(connection *c, const char *document, int length) {
  char head[512];
  int size = sprintf(head, "HTTP/1.1 %ld %s\r\ndate: Mon, 01 Jan 2026 00:00:00 GMT\r\ncontent-type: application/json\r\n"
    "request-id: req_011Mock\r\nanthropic-ratelimit-requests-limit: 4000\r\n"
    "anthropic-ratelimit-requests-remaining: 3999\r\nserver: mock\r\ncontent-length: %d\r\n\r\n",
    c->script.status, c->script.status == 200 ? "OK" : "Error", length);
  append(&c->out, head, (size_t)size);
  append(&c->out, document, (size_t)length);
  c->ended = true;
  finish_if_written(c);
}

static void send_json(connection *c) {
  static char document[MAX_DOCUMENT];
  int length;
  if (c->script.status != 200)
    length = sprintf(document, "{\"type\":\"error\",\"error\":{\"type\":\"mock_error\",\"message\":\"status %ld\"},"
      "\"request_id\":\"req_mock\"}", c->script.status);
  else
    length = format_document(c->protocol, document, now(), (int)c->script.text);
  send_document(c, document, length);
}

static void start_stream(connection *c) {
  static const char head[] = "HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2026 00:00:00 GMT\r\n"
    "content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nrequest-id: req_011Mock\r\n"
    "server: mock\r\ntransfer-encoding: chunked\r\n\r\n";
  stats.streams++;
  stats.active++;
  c->streaming = true;
  append(&c->out, head, sizeof head - 1);
  append_first_events(c);
  if (!c->script.interval_us) {
    send_burst(c);
    return;
  }
  flush(c);
  if (!c->closed) set_timer(c, now() + (uint64_t)c->script.interval_us * 1000);
}

static void send_stats(connection *c) {
  char document[512];
  if (strcmp(c->path, "/stats")) {
    send_document(c, document, sprintf(document, "{\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\","
      "\"created\":1700000000,\"owned_by\":\"mock\"}]}"));
    return;
  }
  send_document(c, document, sprintf(document, "{\"connected\":%lu,\"requests\":%lu,\"streams\":%lu,\"active\":%lu,"
    "\"aborted\":%lu,\"events\":%lu}", stats.connected, stats.requests, stats.streams, stats.active, stats.aborted,
    stats.events));
}

static void start_answer(connection *c) {
  bool stream = find(&c->body, "\"stream\":true") || find(&c->body, "\"stream\": true");
  if (stream && c->script.status == 200) start_stream(c);
  else send_json(c);
}

static void timer_expired(connection *c) {
  if (c->streaming) {
    send_paced(c);
    return;
  }
  cancel_timer(c);
  start_answer(c);
}

/* ---- requests ---- */

static script read_script(const buffer *body) {
  script found = {.events = 200, .text = 1000, .status = 200};
  char *word = find(body, "mock-");
  if (!word) return found;
  for (char *end = body->data + body->length; word < end && *word != '"' && *word != ' '; word++) {
    if (*word != '-' || word + 1 == end) continue;
    long number = word + 2 < end ? strtol(word + 2, NULL, 10) : 0; /* body has a NUL behind its end */
    switch (word[1]) {
    case 'n': found.events = number; break;
    case 'u': found.interval_us = number; break;
    case 'd': found.delay_us = number; break;
    case 'j': found.text = number < MAX_TEXT ? number : MAX_TEXT; break;
    case 'e': found.status = number; break;
    case 'k': found.refuse = true; break;
    case 'K': found.cut = true; break;
    default: break;
    }
  }
  return found;
}

static void answer(connection *c) {
  append(&c->body, "", 1); /* a NUL for strtol, which is no part of it */
  c->body.length--;
  c->phase = ANSWER;
  c->script = read_script(&c->body);
  c->report_usage = find(&c->body, "include_usage") != NULL;
  c->protocol = strstr(c->path, "/chat/completions") ? CHAT : strstr(c->path, "/responses") ? RESPONSES : MESSAGES;
  c->sent = 0;
  c->ended = false;
  if (!strcmp(c->method, "GET")) {
    send_stats(c);
    return;
  }
  stats.requests++;
  if (c->script.refuse) close_connection(c);
  else if (c->script.delay_us) set_timer(c, now() + (uint64_t)c->script.delay_us * 1000);
  else start_answer(c);
}

/* Whether a head was there. */
static bool read_head(connection *c) {
  char *end = find(&c->in, "\r\n\r\n");
  if (!end) return false;
  *end = 0;
  bool chunked = false, expects = false;
  c->keep_alive = true;
  c->body_length = c->body.length = 0;
  sscanf(c->in.data, "%7s %255s", c->method, c->path);
  for (char *line = strstr(c->in.data, "\r\n"); line; line = strstr(line, "\r\n")) {
    line += 2;
    if (!strncasecmp(line, "content-length:", 15)) c->body_length = strtoul(line + 15, NULL, 10);
    else if (!strncasecmp(line, "transfer-encoding:", 18)) chunked = true;
    else if (!strncasecmp(line, "connection: close", 17)) c->keep_alive = false;
    else if (!strncasecmp(line, "expect:", 7)) expects = true;
  }
  drop(&c->in, (size_t)(end + 4 - c->in.data));
  if (expects) append(&c->out, "HTTP/1.1 100 Continue\r\n\r\n", 25);
  if (expects) flush(c);
  c->phase = chunked ? READ_CHUNKS : READ_BODY;
  return true;
}

/* Whether the body is complete. */
static bool read_body(connection *c) {
  size_t missing = c->body_length - c->body.length, count = c->in.length < missing ? c->in.length : missing;
  append(&c->body, c->in.data, count);
  drop(&c->in, count);
  return c->body.length == c->body_length;
}

static bool read_chunks(connection *c) {
  for (;;) {
    char *end = find(&c->in, "\r\n");
    if (!end) return false;
    size_t size = strtoul(c->in.data, NULL, 16), start = (size_t)(end + 2 - c->in.data);
    if (c->in.length < start + size + 2) return false;
    append(&c->body, c->in.data + start, size);
    drop(&c->in, start + size + 2);
    if (!size) return true;
  }
}

static void read_request(connection *c) {
  if (c->phase == READ_HEAD && !read_head(c)) return;
  if (c->phase == READ_BODY ? read_body(c) : c->phase == READ_CHUNKS && read_chunks(c)) answer(c);
}

static void receive(connection *c) {
  while (!c->closed) {
    reserve(&c->in, READ_SIZE);
    ssize_t count = recv(c->fd, c->in.data + c->in.length, c->in.capacity - c->in.length, 0);
    if (count <= 0) {
      if (count == 0 || errno != EAGAIN) close_connection(c);
      return;
    }
    c->in.length += (size_t)count;
    if (c->phase != ANSWER) read_request(c);
  }
}

static void continue_answer(connection *c) {
  if (c->streaming && !c->script.interval_us && !c->ended) {
    if (flush(c)) send_burst(c);
  } else if (c->ended) {
    finish_if_written(c);
  } else {
    flush(c);
  }
}

/* ---- the loop ---- */

static void accept_connections(int listener) {
  int fd, on = 1;
  while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    connection *c = calloc(1, sizeof *c);
    if (!c) die("calloc");
    c->fd = fd;
    c->slot = -1;
    stats.connected++;
    watch(c, EPOLL_CTL_ADD, false);
  }
}

static int start_listening(int port) {
  int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
  struct sockaddr_in address = {
    .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8192)) die("listen");
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
  epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
  return listener;
}

static void handle(const struct epoll_event *event, int listener) {
  connection *c = event->data.ptr;
  if (!c) accept_connections(listener);
  else if (c->closed) return;
  else if (event->events & EPOLLIN) receive(c);
  else if (event->events & (EPOLLHUP | EPOLLERR | EPOLLRDHUP)) close_connection(c);
  if (c && !c->closed && event->events & EPOLLOUT) continue_answer(c);
}

static int wait_for_events(struct epoll_event *events, int limit) {
  if (!timers) return epoll_pwait2(poller, events, limit, NULL, NULL);
  uint64_t time = now(), wait = heap[0]->due > time ? heap[0]->due - time : 0;
  struct timespec timeout = {.tv_sec = (time_t)(wait / 1000000000), .tv_nsec = (long)(wait % 1000000000)};
  return epoll_pwait2(poller, events, limit, &timeout, NULL);
}

int main(int count, char **arguments) {
  if (count != 2) {
    fprintf(stderr, "usage: %s PORT\n", arguments[0]);
    return 2;
  }
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  signal(SIGPIPE, SIG_IGN);
  for (int i = 0; i < MAX_TEXT; i++) padding[i] = i % 6 ? 'x' : ' ';
  poller = epoll_create1(0);
  int listener = start_listening(atoi(arguments[1]));
  static struct epoll_event events[512];
  for (;;) {
    int ready = wait_for_events(events, 512);
    for (int i = 0; i < ready; i++) handle(&events[i], listener);
    for (uint64_t time = now(); timers && heap[0]->due <= time;) timer_expired(heap[0]);
    free_closed();
  }
}
