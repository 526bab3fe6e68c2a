/* A load generator for gateways: one thread, epoll, HTTP/1.1 to 127.0.0.1. It knows the stamps of provider.c.
 *
 *   load -p PORT [options]
 *
 *   -P PATH   (/v1/messages)           -M MODEL  what the request names (claude-sonnet-4-5)
 *   -k WORD   the script for the provider, put into the prompt (mock-n1)
 *   -b BYTES  size of the body, about  -S        ask for a stream
 *   -g        GET, without a body      -H "NAME: VALUE"  another header field, any number of them
 *
 *   -c COUNT  connections (1), each with one request at a time
 *   -n COUNT  requests in all          -d SECONDS  no new ones after that time; those under way may end
 *   -r RATE   requests begin at this rate a second, whatever becomes of them, while a connection is free; without it
 *             a connection begins one as soon as the last has ended
 *   -G US     microseconds from the first request of a connection to the first of the next (0)
 *
 *   -E COUNT  events that a complete answer has; any other number is counted as incomplete
 *   -A COUNT  leave after that many events
 *   -T BYTES  read only so many bytes a second of each connection
 *   -x        a new connection for each request
 *
 * Prints one JSON object; times are in microseconds. Latencies run from when a request was due, so waiting for a free
 * connection counts; an event's delay from its stamp.
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

enum { STAMP = 23, READ_SIZE = 262144, MAX_HEAD = 16384, TICK_NS = 50000000, TICKS_PER_SECOND = 20, MAX_ERRORS = 2000, MESSAGE = 1000 };
#define SECOND 1000000000.0
#define GRACE (30 * (uint64_t)1000000000) /* what is under way may take that long after the last second of -d */

/* What the parser of a response expects next. */
typedef enum { HEAD, SIZED_BODY, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, UNTIL_CLOSE } expected;

typedef struct {
  float *values;
  size_t count, capacity;
} samples;

typedef struct {
  int fd;
  bool open, busy, connecting, wants_write;
  size_t written;         /* of the request */
  uint64_t due;           /* when the request should have begun */
  uint64_t next_read;     /* of a slow reader */
  expected expected;
  char head[MAX_HEAD];
  size_t head_length;
  uint64_t remaining;     /* bytes of the body, or of the chunk */
  char size_line[32];     /* of a chunk */
  size_t size_length;
  int status;
  bool will_close;        /* the server said so */
  char carry[STAMP];      /* the beginning of a stamp whose end was not read yet */
  size_t carried;
  long events;
} connection;

static struct {
  const char *path, *script, *model;
  char headers[4096];
  int port;
  long body, connections, requests, ramp_us, events, leave_after, slow;
  double seconds, rate;
  bool stream, get, reconnect;
} options = {.path = "/v1/messages", .script = "mock-n1", .model = "claude-sonnet-4-5", .connections = 1, .events = -1};

static struct {
  long started, done, errors, bad_status, incomplete, left, cut;
  unsigned long events, bytes, connections;
} counts;

static samples latency, first_event, event_delay;
static char complaint[200];
static char *request;
static size_t request_length;
static struct sockaddr_in address;
static int poller;
static connection *connections;
static long under_way;
static uint64_t begin, end; /* of starting requests */

static uint64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void die(const char *what) {
  perror(what);
  exit(1);
}

static void add_sample(samples *s, uint64_t from, uint64_t to) {
  if (s->count == s->capacity) {
    s->capacity = s->capacity ? s->capacity * 2 : 4096;
    s->values = realloc(s->values, s->capacity * sizeof *s->values);
    if (!s->values) die("realloc");
  }
  s->values[s->count++] = (float)(((double)to - (double)from) / 1000);
}

static void complain(const char *what, const char *detail, size_t length) {
  if (!complaint[0]) snprintf(complaint, sizeof complaint, "%s: %.*s", what, (int)(length < 150 ? length : 150), detail);
}

/* ---- requests ---- */

static void watch(connection *c, int operation, bool write) {
  uint32_t read = options.slow ? 0 : EPOLLIN; /* a slow reader reads by the clock */
  struct epoll_event event = {.events = read | (write ? EPOLLOUT : 0), .data.ptr = c};
  epoll_ctl(poller, operation, c->fd, &event);
  c->wants_write = write;
}

static void open_connection(connection *c) {
  int on = 1, small = 16384;
  c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  if (c->fd < 0) die("socket");
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (options.slow) setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
  int result = connect(c->fd, (struct sockaddr *)&address, sizeof address);
  if (result < 0 && errno != EINPROGRESS) die("connect");
  c->open = true;
  c->connecting = result < 0;
  counts.connections++;
  watch(c, EPOLL_CTL_ADD, true);
}

static void drop_connection(connection *c) {
  if (c->open) close(c->fd);
  c->open = false;
}

static void write_request(connection *c) {
  while (c->written < request_length) {
    ssize_t count = send(c->fd, request + c->written, request_length - c->written, MSG_NOSIGNAL);
    if (count < 0) { /* other errors show when we read */
      if (errno == EAGAIN && !c->wants_write) watch(c, EPOLL_CTL_MOD, true);
      return;
    }
    c->written += (size_t)count;
  }
  if (c->wants_write) watch(c, EPOLL_CTL_MOD, false);
}

static void start_request(connection *c, uint64_t due) {
  counts.started++;
  under_way++;
  c->busy = true;
  c->due = due;
  c->written = c->head_length = c->carried = c->size_length = 0;
  c->events = 0;
  c->next_read = 0;
  c->expected = HEAD;
  if (!c->open) open_connection(c);
  if (!c->connecting) write_request(c);
}

static void end_request(connection *c) {
  c->busy = false;
  under_way--;
}

static void request_failed(connection *c) {
  end_request(c);
  counts.errors++;
  drop_connection(c);
}

static void request_done(connection *c) {
  end_request(c);
  counts.done++;
  add_sample(&latency, c->due, now());
  counts.bad_status += c->status != 200;
  counts.incomplete += options.events >= 0 && c->events != options.events;
  if (c->will_close || options.reconnect) drop_connection(c);
}

/* ---- responses ---- */

static void count_event(connection *c, const char *digits, uint64_t time) {
  uint64_t stamp = 0;
  for (int i = 0; i < 19; i++) stamp = stamp * 10 + (uint64_t)(digits[i] - '0');
  counts.events++;
  c->events++;
  add_sample(&event_delay, stamp, time);
  if (c->events == 1) add_sample(&first_event, c->due, time);
}

/* Find the stamps in what has come, and in what was left of what came before. */
static void look_for_stamps(connection *c, const char *data, size_t length, uint64_t time) {
  static char text[READ_SIZE + STAMP];
  memcpy(text, c->carry, c->carried);
  memcpy(text + c->carried, data, length);
  char *at = text, *stop = text + c->carried + length;
  for (;;) {
    char *found = memmem(at, (size_t)(stop - at), "ts=", 3);
    if (!found) {
      at = stop - at > 2 ? stop - 2 : at;
      break;
    }
    at = found;
    if (stop - at < STAMP) break;
    if (at[STAMP - 1] == ';') count_event(c, at + 3, time);
    at += 3;
  }
  c->carried = (size_t)(stop - at);
  memcpy(c->carry, at, c->carried);
}

static void read_head(connection *c) {
  bool chunked = false, sized = false;
  c->head[c->head_length] = 0;
  c->status = atoi(c->head + 9);
  c->head_length = 0;
  if (c->status == 100) return;
  c->remaining = 0;
  c->will_close = false;
  for (char *line = strstr(c->head, "\r\n"); line; line = strstr(line, "\r\n")) {
    line += 2;
    if (!strncasecmp(line, "content-length:", 15)) {
      sized = true;
      c->remaining = strtoul(line + 15, NULL, 10);
    } else if (!strncasecmp(line, "transfer-encoding:", 18)) {
      chunked = true;
    } else if (!strncasecmp(line, "connection: close", 17)) {
      c->will_close = true;
    }
  }
  c->expected = chunked ? CHUNK_SIZE : sized ? SIZED_BODY : UNTIL_CLOSE;
}

/* Take the head's bytes; how many there were. */
static size_t take_head(connection *c, const char *data, size_t length) {
  for (size_t i = 0; i < length; i++) {
    if (c->head_length < MAX_HEAD - 1) c->head[c->head_length++] = data[i];
    if (c->head_length >= 4 && !memcmp(c->head + c->head_length - 4, "\r\n\r\n", 4)) {
      read_head(c);
      return i + 1;
    }
  }
  return length;
}

static void take_size(connection *c, char byte) {
  if (byte != '\n') {
    if (c->size_length < sizeof c->size_line - 1) c->size_line[c->size_length++] = byte;
    return;
  }
  c->size_line[c->size_length] = 0;
  c->size_length = 0;
  c->remaining = strtoul(c->size_line, NULL, 16);
  c->expected = c->remaining ? CHUNK_DATA : TRAILER;
}

static size_t take_body(connection *c, const char *data, size_t length, uint64_t time) {
  size_t count = c->expected == UNTIL_CLOSE || length < c->remaining ? length : c->remaining;
  look_for_stamps(c, data, count, time);
  if (c->status != 200) complain("answer", data, count);
  if (c->expected == UNTIL_CLOSE) return count;
  c->remaining -= count;
  if (c->expected == CHUNK_DATA && !c->remaining) c->expected = CHUNK_END;
  return count;
}

/* Whether the response is complete. */
static bool parse(connection *c, const char *data, size_t length, uint64_t time) {
  for (size_t i = 0; i < length;) switch (c->expected) {
    case HEAD:
      i += take_head(c, data + i, length - i);
      if (c->expected == SIZED_BODY && !c->remaining) return true;
      break;
    case CHUNK_SIZE:
      take_size(c, data[i++]);
      break;
    case CHUNK_END:
      if (data[i++] == '\n') c->expected = CHUNK_SIZE;
      break;
    case TRAILER:
      if (data[i++] == '\n') return true;
      break;
    case SIZED_BODY:
    case CHUNK_DATA:
    case UNTIL_CLOSE:
      i += take_body(c, data + i, length - i, time);
      if (c->expected == SIZED_BODY && !c->remaining) return true;
      break;
  }
  return false;
}

static void connection_ended(connection *c, bool error) {
  if (!c->busy) {
    drop_connection(c);
  } else if (!error && c->expected == UNTIL_CLOSE) {
    c->will_close = true;
    request_done(c);
  } else {
    complain("ended early", error ? strerror(errno) : "EOF", 80);
    counts.cut++;
    request_failed(c);
  }
}

static void receive(connection *c) {
  static char data[READ_SIZE];
  size_t limit = options.slow ? (size_t)options.slow / TICKS_PER_SECOND + 1 : sizeof data;
  if (limit > sizeof data) limit = sizeof data;
  for (;;) {
    ssize_t count = recv(c->fd, data, limit, 0);
    if (count <= 0) {
      if (count == 0 || errno != EAGAIN) connection_ended(c, count < 0);
      return;
    }
    counts.bytes += (unsigned long)count;
    if (parse(c, data, (size_t)count, now())) {
      request_done(c);
      return;
    }
    if (options.leave_after && c->events >= options.leave_after) {
      end_request(c);
      counts.left++;
      drop_connection(c);
      return;
    }
    if (options.slow || (size_t)count < limit) return;
  }
}

/* ---- the loop ---- */

static bool may_start(uint64_t time) { return counts.started < options.requests && time < end; }

static connection *idle_connection(void) {
  for (long i = 0; i < options.connections; i++)
    if (!connections[i].busy) return &connections[i];
  return NULL;
}

/* Start what is due; when the next will be. */
static uint64_t start_due(uint64_t time) {
  static uint64_t next;
  static long ramped;
  if (!next) next = begin;
  if (options.rate > 0) {
    uint64_t pause = (uint64_t)(SECOND / options.rate);
    for (connection *c; next <= time && may_start(time) && (c = idle_connection()); next += pause) start_request(c, next);
    return next;
  }
  for (; ramped < options.connections && next <= time && may_start(time); next += (uint64_t)options.ramp_us * 1000)
    start_request(&connections[ramped++], now());
  return ramped < options.connections ? next : UINT64_MAX;
}

static void handle(const struct epoll_event *event) {
  connection *c = event->data.ptr;
  if (!c->open) return;
  if (c->connecting && event->events & (EPOLLOUT | EPOLLERR)) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    c->connecting = false;
    if (error) complain("connect", strerror(error), 80);
    if (error) request_failed(c);
    else write_request(c);
  } else if (event->events & EPOLLOUT) {
    write_request(c);
  }
  if (c->open && event->events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(c);
  uint64_t time = now();
  if (!c->busy && options.rate == 0 && may_start(time)) start_request(c, time);
}

static void read_slowly(void) {
  uint64_t time = now();
  for (long i = 0; i < options.connections; i++) {
    connection *c = &connections[i];
    if (!c->busy || c->connecting || c->next_read > time) continue;
    c->next_read = time + TICK_NS;
    receive(c);
    if (!c->busy && may_start(time)) start_request(c, time);
  }
}

static void run(void) {
  static struct epoll_event events[512];
  begin = now();
  end = options.seconds > 0 ? begin + (uint64_t)(options.seconds * SECOND) : UINT64_MAX;
  while (counts.errors < MAX_ERRORS) {
    uint64_t time = now(), next = start_due(time);
    if (!under_way && !may_start(time)) return;
    if (end != UINT64_MAX && time > end + GRACE) return;
    uint64_t wait = next > time && may_start(time) ? next - time : 0;
    struct timespec timeout = {.tv_nsec = wait && wait < TICK_NS ? (long)wait : TICK_NS};
    int ready = epoll_pwait2(poller, events, 512, &timeout, NULL);
    for (int i = 0; i < ready; i++) handle(&events[i]);
    if (options.slow) read_slowly();
  }
}

/* ---- what is sent, and what is printed ---- */

static long pad(char *body, long from, long to) {
  for (; from < to; from++) body[from] = from % 7 ? (char)('a' + from % 23) : ' ';
  return from;
}

static void make_request(void) {
  char *body = calloc(1, (size_t)options.body + 4096);
  request = malloc((size_t)options.body + 16384);
  if (!body || !request) die("malloc");
  long length = sprintf(body, "{\"model\":\"%s\",\"max_tokens\":1024,%s\"messages\":[{\"role\":\"user\",\"content\":\"%s ",
    options.model, options.stream ? "\"stream\":true," : "", options.script);
  while (options.body - length > 3 * MESSAGE) { /* a long conversation, as agents send it again with each turn */
    length = pad(body, length, length + MESSAGE);
    length += sprintf(body + length, "\"},{\"role\":\"assistant\",\"content\":\"");
    length = pad(body, length, length + MESSAGE);
    length += sprintf(body + length, "\"},{\"role\":\"user\",\"content\":\"");
  }
  length = pad(body, length, options.body - 4);
  length += sprintf(body + length, "\"}]}");
  if (options.get) length = 0;
  request_length = (size_t)sprintf(request, "%s %s HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n"
    "accept: application/json\r\nuser-agent: Anthropic/Python 0.60.0\r\nanthropic-version: 2023-06-01\r\n"
    "x-stainless-lang: python\r\nx-stainless-package-version: 0.60.0\r\nx-stainless-runtime: CPython\r\n%s%s"
    "content-length: %ld\r\n\r\n", options.get ? "GET" : "POST", options.path, options.port, options.headers,
    options.reconnect ? "connection: close\r\n" : "", length);
  memcpy(request + request_length, body, (size_t)length);
  request_length += (size_t)length;
  free(body);
}

static int compare(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static double percentile(const samples *s, double share) {
  return s->count ? (double)s->values[(size_t)(share * (double)(s->count - 1) + 0.5)] : 0;
}

static void print_samples(const char *name, samples *s) {
  double sum = 0;
  if (s->count) qsort(s->values, s->count, sizeof *s->values, compare);
  for (size_t i = 0; i < s->count; i++) sum += (double)s->values[i];
  printf(",\"%s\":{\"count\":%zu,\"mean\":%.1f,\"p50\":%.1f,\"p90\":%.1f,\"p99\":%.1f,\"max\":%.1f}", name, s->count,
    s->count ? sum / (double)s->count : 0, percentile(s, .5), percentile(s, .9), percentile(s, .99), percentile(s, 1));
}

static void print_result(void) {
  double seconds = (double)(now() - begin) / SECOND;
  printf("{\"done\":%ld,\"errors\":%ld,\"bad_status\":%ld,\"incomplete\":%ld,\"left\":%ld,\"cut\":%ld,\"unfinished\":%ld",
    counts.done, counts.errors, counts.bad_status, counts.incomplete, counts.left, counts.cut, under_way);
  printf(",\"events\":%lu,\"bytes\":%lu,\"connections\":%lu,\"seconds\":%.4f", counts.events, counts.bytes,
    counts.connections, seconds);
  print_samples("latency", &latency);
  print_samples("first_event", &first_event);
  print_samples("event_delay", &event_delay);
  printf(",\"complaint\":\"");
  for (char *c = complaint; *c; c++)
    if (*c >= ' ') printf(*c == '"' || *c == '\\' ? "\\%c" : "%c", *c);
  printf("\"}\n");
}

static bool read_options(int count, char **arguments) {
  for (int option; (option = getopt(count, arguments, "p:P:M:k:b:SgH:c:n:d:r:G:E:A:T:x")) != -1;) switch (option) {
    case 'p': options.port = atoi(optarg); break;
    case 'P': options.path = optarg; break;
    case 'M': options.model = optarg; break;
    case 'k': options.script = optarg; break;
    case 'b': options.body = atol(optarg); break;
    case 'S': options.stream = true; break;
    case 'g': options.get = true; break;
    case 'H':
      if (strlen(options.headers) + strlen(optarg) + 3 > sizeof options.headers) return false;
      strcat(strcat(options.headers, optarg), "\r\n");
      break;
    case 'c': options.connections = atol(optarg); break;
    case 'n': options.requests = atol(optarg); break;
    case 'd': options.seconds = atof(optarg); break;
    case 'r': options.rate = atof(optarg); break;
    case 'G': options.ramp_us = atol(optarg); break;
    case 'E': options.events = atol(optarg); break;
    case 'A': options.leave_after = atol(optarg); break;
    case 'T': options.slow = atol(optarg); break;
    case 'x': options.reconnect = true; break;
    default: return false;
  }
  if (!options.requests) options.requests = options.seconds > 0 ? INT64_MAX : options.connections;
  return options.port > 0 && options.connections > 0;
}

int main(int count, char **arguments) {
  if (!read_options(count, arguments)) {
    fprintf(stderr, "usage: %s -p PORT [options], see the head of load.c\n", arguments[0]);
    return 2;
  }
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  signal(SIGPIPE, SIG_IGN);
  address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port),
                                 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  poller = epoll_create1(0);
  connections = calloc((size_t)options.connections, sizeof *connections);
  if (!connections) die("calloc");
  make_request();
  run();
  print_result();
  return 0;
}
