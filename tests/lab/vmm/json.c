/* Answers: a JSON object on a line, flushed. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "vmm.h"

static FILE *out;
static char *text;
static size_t text_len;
static bool first;

static void quoted(const char *s)
{
	fputc('"', out);
	for (; *s; s++) {
		unsigned char c = (unsigned char)*s;

		if (c == '"' || c == '\\')
			fprintf(out, "\\%c", c);
		else if (c < 0x20 || c == 0x7f)
			fprintf(out, "\\u%04x", c);
		else
			fputc(c, out);
	}
	fputc('"', out);
}

void json_key(const char *key)
{
	if (!first)
		fputc(',', out);
	first = false;
	if (key) {
		quoted(key);
		fputc(':', out);
	}
}

void json_str(const char *key, const char *value) { json_key(key); quoted(value); }
void json_int(const char *key, long long value) { json_key(key); fprintf(out, "%lld", value); }
void json_uint(const char *key, unsigned long long value) { json_key(key); fprintf(out, "%llu", value); }
void json_bool(const char *key, bool value) { json_key(key); fputs(value ? "true" : "false", out); }
void json_open(const char *key, char bracket) { json_key(key); fputc(bracket, out); first = true; }
void json_close(char bracket) { fputc(bracket, out); first = false; }

void json_begin(const char *step)
{
	out = open_memstream(&text, &text_len);
	fputc('{', out);
	first = true;
	json_str("step", step);
}

static unsigned long long now(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (unsigned long long)t.tv_sec * 1000000000ULL + (unsigned long long)t.tv_nsec;
}

void json_end(void)
{
	json_uint("mono_ns", now(CLOCK_MONOTONIC));
	json_uint("real_ns", now(CLOCK_REALTIME));
	fputs("}\n", out);
	fclose(out);
	fwrite(text, 1, text_len, stdout);
	fflush(stdout);
	free(text);
}

const char *errno_name(int nr)
{
	static char other[24];
	const char *name = strerrorname_np(nr);

	if (name)
		return name;
	snprintf(other, sizeof(other), "E%d", nr);
	return other;
}

void json_errno(int nr)
{
	json_str("errno", errno_name(nr));
	json_int("errno_nr", nr);
}

void outcomes_add(struct outcomes *list, const struct outcome *o)
{
	for (size_t i = list->n; i-- > 0;) {
		struct outcome *have = &list->v[i];

		if (have->ret == o->ret && have->err == o->err && have->reason == o->reason &&
		    have->annotated == o->annotated && have->suberror == o->suberror &&
		    (!o->annotated || (have->flags == o->flags && have->gpa == o->gpa && have->size == o->size))) {
			have->count += o->count;
			return;
		}
	}
	if (list->n == list->cap) {
		list->cap = list->cap ? 2 * list->cap : 8;
		list->v = realloc(list->v, list->cap * sizeof(*list->v));
		if (!list->v)
			abort();
	}
	list->v[list->n++] = *o;
}

void json_outcome(const struct outcome *o)
{
	json_int("ret", o->ret);
	if (o->ret < 0)
		json_errno(o->err);
	json_uint("reason", o->reason);
	if (o->ret < 0 || o->annotated)
		json_bool("annotated", o->annotated);
	if (o->ret >= 0 && o->reason == KVM_EXIT_INTERNAL_ERROR)
		json_uint("suberror", o->suberror);
	if (o->annotated) {
		json_uint("gpa", o->gpa);
		json_uint("gfn", o->gpa / page_size);
		json_uint("flags", o->flags);
		json_uint("size", o->size);
	}
}
