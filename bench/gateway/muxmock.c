// A mock of an own replica: speaks the link (neaptide/link.py) on Unix sockets, so that the gateway's share of a
// request and of a token can be measured without an engine behind it. One thread, epoll.
//
//   muxmock [--token T] [--step-ms 20] [--epoch 0] SOCKET...
//
// Every --step-ms one "engine step": a TOKEN frame for each running stream, all frames of a connection in one write.
// The content of each chunk is "@<CLOCK_MONOTONIC ns>", which loadgen --mode stream turns into transit times. A
// stream without credit skips the step. Built by bench/kit.py: gcc -O2 -Wall.
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { HELLO, OPEN, BODY, HEADERS, TOKEN, END, ABORT, CREDIT, LOAD, TALLY, DRAIN };
enum { MAX_FRAME = 1 << 20, FIRST_CREDIT = 64 * 1024, SLOTS = 4096, PROMPT_TOKENS = 128 };

typedef struct {
    unsigned id;
    int stream, usage, left, total, body_left, closed;
    long credit;
} Stream;

typedef struct {
    int fd, greeted;
    char *in;
    size_t n, cap;
    char *out;
    size_t on, ocap, opos;
    Stream *s;
    int ns, cs, told; // streams, room for streams, running as last told
    long told_at, phase;
} Conn;

static Conn conns[64];
static int nconns, ep, step_ms = 20, epoch;
static const char *boot_token = "";
static const char *REPLY =
    "{\"id\":\"chatcmpl-7f3a9c2e51b84d0d9a6e\",\"object\":\"chat.completion\",\"created\":1763600000,"
    "\"model\":\"mock\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"The quick brown "
    "fox "
    "jumps over the lazy dog. It then returns to the den and rests for the remainder of the afternoon, dreaming of "
    "further adventures in the meadow beyond the river bend.\",\"refusal\":null,\"tool_calls\":null},"
    "\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":128,\"completion_tokens\":42,"
    "\"total_tokens\":170,\"prompt_tokens_details\":{\"cached_tokens\":0}}}";
#define CHUNK                                                                                                        \
    "data: {\"id\":\"chatcmpl-7f3a9c2e51b84d0d9a6e\",\"object\":\"chat.completion.chunk\",\"created\":1763600000,"   \
    "\"model\":\"mock\",\"choices\":"

static long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void put(Conn *c, const void *p, size_t n) {
    if (c->on + n > c->ocap) {
        c->ocap = (c->on + n) * 2;
        c->out = realloc(c->out, c->ocap);
    }
    memcpy(c->out + c->on, p, n);
    c->on += n;
}

static void frame(Conn *c, unsigned stream, unsigned char type, const void *head, size_t hn, const void *rest,
                  size_t rn) {
    unsigned len = hn + rn;
    put(c, &len, 4);
    put(c, &stream, 4);
    put(c, &type, 1);
    put(c, head, hn);
    put(c, rest, rn);
}

static void flush(Conn *c) {
    while (c->fd >= 0 && c->opos < c->on) {
        ssize_t w = send(c->fd, c->out + c->opos, c->on - c->opos, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (w <= 0)
            return; // full: the next step tries again
        c->opos += w;
    }
    c->on = c->opos = 0;
}

static void drop(Conn *c, const char *why) {
    if (why)
        fprintf(stderr, "muxmock: closing the connection: %s\n", why);
    close(c->fd);
    c->fd = -1;
    c->ns = 0;
    c->n = c->on = c->opos = 0;
}

static void hello(Conn *c) {
    char b[700];
    int n =
        snprintf(b, sizeof b,
                 "{\"version\":1,\"token\":\"%s\",\"role\":\"replica\",\"name\":\"muxmock\",\"epoch\":%d,\"pid\":%d,"
                 "\"describe\":{\"engine\":\"muxmock\",\"model\":\"mock\",\"context_tokens\":131072,"
                 "\"vocab_size\":32000,\"max_running\":%d,\"kv_tokens\":100000000}}",
                 boot_token, epoch, getpid(), SLOTS);
    frame(c, 0, HELLO, b, n, 0, 0);
}

static void load(Conn *c) {
    char b[200];
    int n = snprintf(b, sizeof b,
                     "{\"running\":%d,\"waiting\":0,\"slots\":%d,\"free_kv_tokens\":100000000,\"step_s\":%.3f}",
                     c->ns, SLOTS - c->ns, step_ms / 1e3);
    frame(c, 0, LOAD, b, n, 0, 0);
    c->told = c->ns;
    c->told_at = now_ns();
}

static void end(Conn *c, Stream *s, const char *finish, const char *last, size_t ln) {
    char b[400];
    int n = snprintf(b + 2, sizeof b - 2,
                     "{\"finish\":\"%s\",\"content_type\":\"%s\",\"prompt_tokens\":%d,\"output_tokens\":%d}", finish,
                     s->stream ? "text/event-stream" : "application/json", PROMPT_TOKENS,
                     s->stream ? s->total - s->left : 42);
    b[0] = n & 255;
    b[1] = n >> 8;
    frame(c, s->id, END, b, n + 2, last, ln);
    s->closed = 1;
}

static int number(const char *json, const char *key, int fallback) {
    const char *p = strstr(json, key);
    if (!p)
        return fallback;
    p += strlen(key);
    while (*p == ' ' || *p == ':')
        p++;
    return *p == 't' ? 1 : *p == 'f' ? 0 : atoi(p);
}

static Stream *find(Conn *c, unsigned id) {
    for (int i = 0; i < c->ns; i++)
        if (c->s[i].id == id)
            return &c->s[i];
    return 0;
}

// The body's last byte is here: a non-streaming request is answered at once, a streaming one from the next step on.
static void begin(Conn *c, Stream *s) {
    if (!s->stream)
        end(c, s, "stop", REPLY, strlen(REPLY));
}

static const char *opened(Conn *c, unsigned id, const char *p, unsigned len) {
    char head[4096];
    unsigned hn = len >= 2 ? (unsigned char)p[0] | (unsigned char)p[1] << 8 : 0;
    if (len < 2 || 2 + hn > len || hn >= sizeof head)
        return "an OPEN frame shorter than its header";
    memcpy(head, p + 2, hn);
    head[hn] = 0;
    if (c->ns == c->cs) {
        c->cs = c->cs * 2 + 256;
        c->s = realloc(c->s, c->cs * sizeof(Stream));
    }
    Stream *s = &c->s[c->ns++];
    *s = (Stream){.id = id, .credit = FIRST_CREDIT};
    s->stream = number(head, "\"stream\"", 0);
    s->usage = number(head, "\"include_usage\"", 0);
    unsigned first = len - 2 - hn;
    s->body_left = number(head, "\"body_bytes\"", 0) - (int)first;
    char *body = strndup(p + 2 + hn, first); // max_tokens is looked for in the first part, which holds it in the kit
    s->left = s->total = number(body, "\"max_tokens\"", 64);
    free(body);
    if (s->body_left <= 0)
        begin(c, s);
    return 0;
}

static const char *took(Conn *c, unsigned id, int type, const char *p, unsigned len) {
    Stream *s = find(c, id);
    if (!c->greeted) {
        char *text = strndup(p, len), want[600];
        snprintf(want, sizeof want, "\"token\":\"%s\"", boot_token);
        int good = type == HELLO && number(text, "\"version\"", 0) == 1 && (!*boot_token || strstr(text, want));
        free(text);
        if (!good)
            return "the first frame is no HELLO of version 1 with the boot token";
        c->greeted = 1;
        hello(c);
        load(c);
        return 0;
    }
    switch (type) {
    case OPEN:
        return opened(c, id, p, len);
    case BODY:
        if (s && (s->body_left -= (int)len) <= 0)
            begin(c, s);
        return 0;
    case ABORT:
        if (s)
            end(c, s, "abort", 0, 0);
        return 0;
    case CREDIT:
        if (len != 4)
            return "a CREDIT frame that is not four bytes";
        unsigned more;
        memcpy(&more, p, 4);
        if (s)
            s->credit += more;
        return 0;
    case TALLY:
        frame(c, 0, TALLY, "{}", 2, 0, 0);
        return 0;
    default:
        return "a frame of a type that a gateway does not send";
    }
}

static void sweep(Conn *c) { // closed streams leave; order does not matter
    for (int i = 0; i < c->ns; i++)
        if (c->s[i].closed)
            c->s[i--] = c->s[--c->ns];
}

static void readable(Conn *c) {
    if (c->cap - c->n < 65536) {
        c->cap = c->cap * 2 + 131072;
        c->in = realloc(c->in, c->cap);
    }
    ssize_t r = recv(c->fd, c->in + c->n, c->cap - c->n, MSG_DONTWAIT);
    if (r <= 0) {
        if (r == 0 || errno != EAGAIN)
            drop(c, 0);
        return;
    }
    c->n += r;
    size_t p = 0;
    while (c->n - p >= 9) {
        unsigned len, id;
        memcpy(&len, c->in + p, 4);
        memcpy(&id, c->in + p + 4, 4);
        if (len > MAX_FRAME) {
            drop(c, "a frame over 1 MiB");
            return;
        }
        if (c->n - p < 9 + (size_t)len)
            break;
        const char *wrong = took(c, id, (unsigned char)c->in[p + 8], c->in + p + 9, len);
        if (wrong) {
            drop(c, wrong);
            return;
        }
        p += 9 + len;
    }
    memmove(c->in, c->in + p, c->n - p);
    c->n -= p;
    sweep(c);
    if (c->on)
        flush(c);
}

static void emit(Conn *c, Stream *s) {
    char b[600], head[6] = {1, 0};
    unsigned id = s->left;
    memcpy(head + 2, &id, 4);
    int n = snprintf(
        b, sizeof b,
        CHUNK "[{\"index\":0,\"delta\":{%s\"content\":\"@%ld\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n",
        s->left == s->total ? "\"role\":\"assistant\"," : "", now_ns());
    if (s->credit < n + 6)
        return;
    s->credit -= n + 6;
    s->left--;
    frame(c, s->id, TOKEN, head, sizeof head, b, n);
    if (s->left > 0)
        return;
    char last[1200];
    int m = snprintf(last, sizeof last,
                     CHUNK "[{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"length\"}]}\n\n");
    if (s->usage)
        m += snprintf(last + m, sizeof last - m,
                      CHUNK "[],\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d,\"total_tokens\":%d}}\n\n",
                      PROMPT_TOKENS, s->total, PROMPT_TOKENS + s->total);
    m += snprintf(last + m, sizeof last - m, "data: [DONE]\n\n");
    end(c, s, "length", last, m);
}

static void step(Conn *c, long tick) {
    if (c->fd < 0 || !c->greeted || tick % step_ms != c->phase)
        return;
    if (c->on - c->opos < 4 * MAX_FRAME) // a gateway that does not read gets no more
        for (int i = 0; i < c->ns; i++)
            if (c->s[i].stream && c->s[i].body_left <= 0 && !c->s[i].closed)
                emit(c, &c->s[i]);
    sweep(c);
    if (c->ns != c->told && now_ns() - c->told_at > 50000000)
        load(c);
    flush(c);
}

static void accepted(int listener) {
    int fd = accept(listener, 0, 0), at = 0;
    while (at < nconns && conns[at].fd >= 0)
        at++;
    if (fd < 0 || at == 64) {
        if (fd >= 0)
            close(fd);
        return;
    }
    nconns += at == nconns;
    free(conns[at].in);
    free(conns[at].out);
    free(conns[at].s);
    conns[at] = (Conn){.fd = fd, .phase = (at * 7) % step_ms}; // replicas do not step in unison
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = at};
    epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
}

static int listen_at(const char *path, int index) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    if (strlen(path) >= sizeof a.sun_path) {
        fprintf(stderr, "muxmock: %s: a socket's path has at most %zu bytes\n", path, sizeof a.sun_path - 1);
        return 0;
    }
    strcpy(a.sun_path, path);
    unlink(path);
    umask(0177);
    if (bind(s, (void *)&a, sizeof a) || listen(s, 64)) {
        perror(path);
        return 0;
    }
    struct epoll_event e = {.events = EPOLLIN, .data.u64 = 1000 + index + ((unsigned long)s << 32)};
    epoll_ctl(ep, EPOLL_CTL_ADD, s, &e);
    return 1;
}

int main(int ac, char **av) {
    ep = epoll_create1(0);
    int sockets = 0;
    for (int i = 1; i < ac; i++) {
        if (!strcmp(av[i], "--token") && i + 1 < ac)
            boot_token = av[++i];
        else if (!strcmp(av[i], "--step-ms") && i + 1 < ac)
            step_ms = atoi(av[++i]) > 0 ? atoi(av[i]) : 20;
        else if (!strcmp(av[i], "--epoch") && i + 1 < ac)
            epoch = atoi(av[++i]);
        else if (!listen_at(av[i], sockets++))
            return 1;
    }
    if (!sockets) {
        fprintf(stderr, "usage: muxmock [--token T] [--step-ms 20] [--epoch 0] SOCKET...\n");
        return 2;
    }
    long tick = now_ns() / 1000000;
    struct epoll_event ev[64];
    for (;;) {
        long w = (tick + 1) * 1000000 - now_ns();
        struct timespec ts = {0, w > 0 ? w : 0};
        int n = epoll_pwait2(ep, ev, 64, &ts, 0);
        for (int i = 0; i < n; i++) {
            unsigned k = ev[i].data.u64 & 0xffffffff;
            if (k >= 1000)
                accepted(ev[i].data.u64 >> 32);
            else if (conns[k].fd >= 0)
                readable(&conns[k]);
        }
        for (long t = now_ns() / 1000000; tick < t; tick++)
            for (int k = 0; k < nconns; k++)
                step(&conns[k], tick);
    }
}
