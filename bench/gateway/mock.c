// OpenAI-compatible mock upstream. Single thread, epoll. 127.0.0.1 only.
//   usage: mock PORT [PORT...]
// Non-stream request: immediate ~600 byte JSON reply with usage.
// "stream":true     : max_tokens SSE chunks (default 64). Each chunk's content is "@<CLOCK_MONOTONIC ns>".
// "seed":P (P>0)    : pace the stream at P ms per token; otherwise one chunk per loop turn per stream (fast).
// Built by bench/kit.py: gcc -O2 -Wall.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>
#include <errno.h>
#include <time.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>

#define MAXFD 70000
#define WHEEL 4096

typedef struct C {
    int fd, streaming, left, total, pace; // tokens left and in all, ms a token (0 = as fast as possible)
    char *in;
    size_t n, cap;
    char *out;
    size_t on, ocap, opos;
    int want_write;
    int in_wheel, slot; // paced streams hang in a timer wheel of 1 ms slots
    long due;
    struct C *wn, *wp;
    int in_fast; // unpaced ones in a ring, one chunk a turn
    struct C *fn, *fp;
} C;
static C *conns[MAXFD];
static C *wheel[WHEEL];
static C fast;
static int ep;
static int listening[MAXFD];
static unsigned long requests, chunks;

static long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void drop(C *c) {
    if (c->in_wheel) {
        if (c->wp)
            c->wp->wn = c->wn;
        else
            wheel[c->slot] = c->wn;
        if (c->wn)
            c->wn->wp = c->wp;
        c->in_wheel = 0;
    }
    if (c->in_fast) {
        c->fp->fn = c->fn;
        c->fn->fp = c->fp;
        c->in_fast = 0;
    }
    conns[c->fd] = 0;
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

static int out(C *c, const char *b, size_t n) {
    if (c->on == c->opos) {
        ssize_t w = send(c->fd, b, n, MSG_NOSIGNAL);
        if (w < 0) {
            if (errno != EAGAIN)
                return -1;
            w = 0;
        }
        if ((size_t)w == n)
            return 0;
        b += w;
        n -= w;
        c->on = c->opos = 0;
    }
    if (c->on + n > c->ocap) {
        c->ocap = (c->on + n) * 2;
        c->out = realloc(c->out, c->ocap);
    }
    memcpy(c->out + c->on, b, n);
    c->on += n;
    if (!c->want_write) {
        c->want_write = 1;
        struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.fd = c->fd};
        epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &e);
    }
    return 0;
}

static void wheel_add(C *c, long due_ms) {
    c->due = due_ms;
    c->slot = due_ms % WHEEL;
    c->wp = 0;
    c->wn = wheel[c->slot];
    if (c->wn)
        c->wn->wp = c;
    wheel[c->slot] = c;
    c->in_wheel = 1;
}

static void wheel_del(C *c) {
    if (c->wp)
        c->wp->wn = c->wn;
    else
        wheel[c->slot] = c->wn;
    if (c->wn)
        c->wn->wp = c->wp;
    c->in_wheel = 0;
}

static const char *REPLY =
    "{\"id\":\"chatcmpl-7f3a9c2e51b84d0d9a6e\",\"object\":\"chat.completion\",\"created\":1763600000,\"model\":"
    "\"mock\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"The quick brown fox jumps "
    "over the lazy dog. It then returns to the den and rests for the remainder of the afternoon, dreaming of further "
    "adventures in the meadow beyond the river "
    "bend.\",\"refusal\":null,\"tool_calls\":null},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{"
    "\"prompt_tokens\":128,\"completion_tokens\":42,\"total_tokens\":170,\"prompt_tokens_details\":{\"cached_"
    "tokens\":0}},\"system_fingerprint\":\"fp_mock\",\"service_tier\":null}";
static char whole_reply[2048];
static size_t whole_reply_n;
// One chunk; 1 when that was the last, -1 when the connection is broken.
static int emit(C *c) {
    char b[512], o[640];
    int n;
    if (c->left > 0) {
        c->left--;
        chunks++;
        n = snprintf(b, sizeof b,
                     "data: "
                     "{\"id\":\"chatcmpl-7f3a9c2e51b84d0d9a6e\",\"object\":\"chat.completion.chunk\",\"created\":"
                     "1763600000,\"model\":\"mock\",\"choices\":[{\"index\":0,\"delta\":{%s\"content\":\"@%ld\"},"
                     "\"logprobs\":null,\"finish_reason\":null}]}\n\n",
                     c->left == c->total - 1 ? "\"role\":\"assistant\"," : "", now_ns());
        int m = snprintf(o, sizeof o, "%x\r\n", n);
        memcpy(o + m, b, n);
        memcpy(o + m + n, "\r\n", 2);
        return out(c, o, m + n + 2) < 0 ? -1 : 0;
    }
    char t[1200];
    n = snprintf(t, sizeof t,
                 "data: "
                 "{\"id\":\"chatcmpl-7f3a9c2e51b84d0d9a6e\",\"object\":\"chat.completion.chunk\",\"created\":"
                 "1763600000,\"model\":\"mock\",\"choices\":[{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_"
                 "reason\":\"stop\"}]}\n\n"
                 "data: "
                 "{\"id\":\"chatcmpl-7f3a9c2e51b84d0d9a6e\",\"object\":\"chat.completion.chunk\",\"created\":"
                 "1763600000,\"model\":\"mock\",\"choices\":[],\"usage\":{\"prompt_tokens\":128,\"completion_"
                 "tokens\":%d,\"total_tokens\":%d}}\n\ndata: [DONE]\n\n",
                 c->total, 128 + c->total);
    char h[32];
    int m = sprintf(h, "%x\r\n", n);
    char z[1300];
    memcpy(z, h, m);
    memcpy(z + m, t, n);
    memcpy(z + m + n, "\r\n0\r\n\r\n", 7);
    c->streaming = 0;
    return out(c, z, m + n + 7) < 0 ? -1 : 1;
}

static int reply(C *c, const char *ct, const char *b) {
    char o[4096];
    int n = snprintf(o, sizeof o, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n%s", ct,
                     strlen(b), b);
    return out(c, o, n);
}

static int handle(C *c, char *hdr, char *body, size_t bn) {
    requests++;
    if (!memcmp(hdr, "GET", 3) || !memcmp(hdr, "HEAD", 4)) {
        if (strstr(hdr, "/v1/models"))
            return reply(c, "application/json",
                         "{\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\",\"created\":"
                         "1763600000,\"owned_by\":\"vllm\",\"root\":\"mock\",\"parent\":null}]}");
        if (!strncmp(hdr + 4, "/metrics", 8))
            return reply(c, "text/plain",
                         "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:gpu_cache_usage_perc 0.0\n");
        if (!strncmp(hdr + 4, "/mockstat", 9)) {
            char s[128];
            sprintf(s, "{\"req\":%lu,\"chunk\":%lu}", requests, chunks);
            return reply(c, "application/json", s);
        }
        return reply(c, "application/json",
                     "{\"status\":\"ok\",\"model_path\":\"mock\",\"served_model_name\":\"mock\",\"is_generation\":"
                     "true,\"tokenizer_path\":\"mock\",\"version\":\"0\"}");
    }
    char save = body[bn];
    body[bn] = 0;
    int st = 0;
    char *p = strstr(body, "\"stream\"");
    if (p) {
        p += 8;
        while (*p == ' ' || *p == ':')
            p++;
        st = !strncmp(p, "true", 4);
    }
    int mt = 64, pace = 0;
    if (st) {
        p = strstr(body, "\"max_tokens\"");
        if (p) {
            p += 12;
            while (*p == ' ' || *p == ':')
                p++;
            mt = atoi(p);
            if (mt < 1)
                mt = 64;
        }
        p = strstr(body, "\"seed\"");
        if (p) {
            p += 6;
            while (*p == ' ' || *p == ':')
                p++;
            pace = atoi(p);
        }
    }
    body[bn] = save;
    if (!st)
        return out(c, whole_reply, whole_reply_n);
    static const char *sh = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: "
                            "no-cache\r\nTransfer-Encoding: chunked\r\n\r\n";
    if (out(c, sh, strlen(sh)) < 0)
        return -1;
    c->streaming = 1;
    c->left = c->total = mt;
    c->pace = pace;
    if (pace > 0)
        wheel_add(c, now_ns() / 1000000 + 1);
    else {
        c->fn = fast.fn;
        c->fp = &fast;
        fast.fn->fp = c;
        fast.fn = c;
        c->in_fast = 1;
    }
    return 0;
}

static int readable(C *c) {
    for (;;) {
        if (c->cap - c->n < 8192) {
            c->cap = c->cap ? c->cap * 2 : 16384;
            c->in = realloc(c->in, c->cap + 1);
        }
        ssize_t r = recv(c->fd, c->in + c->n, c->cap - c->n, 0);
        if (r == 0)
            return -1;
        if (r < 0) {
            if (errno == EAGAIN)
                break;
            return -1;
        }
        c->n += r;
        if ((size_t)r < 8192)
            break;
    }
    while (c->n && !c->streaming) {
        c->in[c->n] = 0;
        char *e = strstr(c->in, "\r\n\r\n");
        if (!e)
            break;
        size_t hl = e + 4 - c->in, bl = 0, tot;
        char *bd = c->in + hl;
        char sv = *bd;
        *bd = 0;
        char *h = strcasestr(c->in, "\r\ncontent-length:");
        char *te = strcasestr(c->in, "\r\ntransfer-encoding: chunked");
        if (h)
            bl = strtoul(h + 17, 0, 10);
        *bd = sv;
        if (te) {
            char *z = memmem(bd, c->n - hl, "0\r\n\r\n", 5);
            if (!z)
                break;
            tot = z + 5 - c->in;
            bl = z - bd;
        } else
            tot = hl + bl;
        if (c->n < tot)
            break;
        if (handle(c, c->in, bd, bl) < 0)
            return -1;
        memmove(c->in, c->in + tot, c->n - tot);
        c->n -= tot;
    }
    return 0;
}

int main(int ac, char **av) {
    whole_reply_n =
        sprintf(whole_reply,
                "HTTP/1.1 200 OK\r\nServer: mock\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                strlen(REPLY), REPLY);
    fast.fn = fast.fp = &fast;
    ep = epoll_create1(0);
    for (int i = 1; i < ac; i++) {
        int s = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
        setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, 4);
        struct sockaddr_in a = {
            .sin_family = AF_INET, .sin_port = htons(atoi(av[i])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        if (bind(s, (void *)&a, sizeof a) || listen(s, 4096)) {
            perror("bind");
            return 1;
        }
        listening[s] = 1;
        struct epoll_event e = {.events = EPOLLIN, .data.fd = s};
        epoll_ctl(ep, EPOLL_CTL_ADD, s, &e);
    }
    static struct epoll_event ev[1024];
    long tick = now_ns() / 1000000;
    for (;;) {
        // Sleep until the next millisecond, 20 ms where nothing is due, not at all while an unpaced stream runs.
        int busy = fast.fn != &fast, due_soon = 0;
        for (int k = 0; k < 64 && !busy && !due_soon; k++)
            due_soon = wheel[(tick + k) % WHEEL] != 0;
        long wait = (tick + 1) * 1000000 - now_ns();
        struct timespec ts = {0, busy || wait < 0 ? 0 : wait};
        if (!busy && !due_soon)
            ts.tv_nsec = 20000000;
        int n = epoll_pwait2(ep, ev, 1024, &ts, 0);
        for (int i = 0; i < n; i++) {
            int fd = ev[i].data.fd;
            if (listening[fd]) {
                for (int q = 0; q < 256; q++) {
                    int a = accept4(fd, 0, 0, SOCK_NONBLOCK);
                    if (a < 0)
                        break;
                    if (a >= MAXFD) {
                        close(a);
                        continue;
                    }
                    int one = 1;
                    setsockopt(a, IPPROTO_TCP, TCP_NODELAY, &one, 4);
                    conns[a] = calloc(1, sizeof(C));
                    conns[a]->fd = a;
                    struct epoll_event e = {.events = EPOLLIN, .data.fd = a};
                    epoll_ctl(ep, EPOLL_CTL_ADD, a, &e);
                }
                continue;
            }
            C *c = conns[fd];
            if (!c)
                continue;
            if (ev[i].events & EPOLLOUT && c->want_write) {
                ssize_t w = send(fd, c->out + c->opos, c->on - c->opos, MSG_NOSIGNAL);
                if (w < 0 && errno != EAGAIN) {
                    drop(c);
                    continue;
                }
                if (w > 0)
                    c->opos += w;
                if (c->opos == c->on) {
                    c->on = c->opos = 0;
                    c->want_write = 0;
                    struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
                    epoll_ctl(ep, EPOLL_CTL_MOD, fd, &e);
                }
            }
            if (ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                if (readable(c) < 0) {
                    drop(c);
                    continue;
                }
        }
        for (C *c = fast.fn; c != &fast;) {
            C *nx = c->fn;
            if (c->on - c->opos < 65536) {
                int r = emit(c);
                if (r) {
                    c->fp->fn = c->fn;
                    c->fn->fp = c->fp;
                    c->in_fast = 0;
                    if (r < 0)
                        drop(c);
                    else if (c->n && readable(c) < 0)
                        drop(c);
                }
            }
            c = nx;
        }
        long t = now_ns() / 1000000;
        if (t - tick > WHEEL - 2)
            tick = t - WHEEL + 2;
        while (tick < t) {
            tick++;
            C *c = wheel[tick % WHEEL];
            while (c) {
                C *nx = c->wn;
                if (c->due <= tick) {
                    wheel_del(c);
                    int r = emit(c);
                    if (r < 0)
                        drop(c);
                    else if (r == 0) {
                        long d = c->due + (c->left ? c->pace : 0);
                        if (d <= tick)
                            d = tick + (c->left ? 1 : 0);
                        if (c->left == 0) { // finish right away with final block
                            r = emit(c);
                            if (r < 0)
                                drop(c);
                            else if (c->n && readable(c) < 0)
                                drop(c);
                        } else
                            wheel_add(c, d);
                    }
                }
                c = nx;
            }
        }
    }
}
