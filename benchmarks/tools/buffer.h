/* Bytes that grow. Only provider.c includes it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  char *data;
  size_t length, capacity;
} buffer;

static void die(const char *what) {
  perror(what);
  exit(1);
}

static void reserve(buffer *b, size_t more) {
  if (b->length + more <= b->capacity) return;
  b->capacity = (b->length + more) * 2;
  b->data = realloc(b->data, b->capacity);
  if (!b->data) die("realloc");
}

static void append(buffer *b, const char *data, size_t length) {
  reserve(b, length);
  if (length) memcpy(b->data + b->length, data, length);
  b->length += length;
}

static void drop(buffer *b, size_t length) {
  b->length -= length;
  if (b->length) memmove(b->data, b->data + length, b->length);
}

static char *find(const buffer *b, const char *what) {
  return b->length ? memmem(b->data, b->length, what, strlen(what)) : NULL;
}
