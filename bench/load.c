/* The load generator: holds many event streams in one thread, and notes when each event arrives.
 *
 *     load HOST PORT READY HEADS [CLIENT_ADDRESSES]
 *
 * READY is the text after which a stream counts as open ("event: ready" of the service; an empty
 * line, the end of the response's head, elsewhere), or "head" for that empty line. HEADS is a file
 * with the heads of the requests, each ended by a NUL byte; stream n sends head n modulo their
 * number. Streams come from as many addresses 127.0.0.2, 127.0.0.3, ... as are asked for, so that
 * ports do not run out.
 *
 * An event that is to be counted carries "@SEQUENCE.NANOSECONDS@" in its data, the time on
 * CLOCK_MONOTONIC at which it was published: that clock is the same in all processes of a machine.
 * It has arrived when the empty line behind it has.
 *
 * Commands come in on stdin, one a line; each is answered with one line of JSON on stdout:
 *
 *     open COUNT AT_ONCE MS    open streams until COUNT are, AT_ONCE connects under way at a time
 *     wait TOTAL MS            until TOTAL events have arrived since the last reset
 *     reset                    forget what was counted; what was published before counts no more
 *     record COUNT             from now on keep sequence number and time of arrival of that many
 *     dump FILE                write these, two unsigned 64-bit numbers each, in host order
 *     stats                    what was counted, the distribution of latencies, CPU used
 *     close COUNT              close all streams but the first so many
 *
 * How cheap it is: one epoll_wait for up to 1,024 sockets, one recv and one clock_gettime for each;
 * a receiving kernel does less than the sending one, which on the loopback interface also runs the
 * receiver's half of TCP. Latencies go into buckets that grow by 1/64 (as in HdrHistogram).
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

/* Limits */
#define BATCH 1024
#define BUFFER 65536
#define CARRY 64       /* longest mark, and longest READY */
#define LINE 4096

/* Buckets: 64 for each power of two microseconds, up to 2^36 us. */
#define SUB 64
#define BUCKETS (SUB * 32)

enum state { FREE, CONNECTING, OPENING, OPEN };

struct stream {
    int fd;
    unsigned char state;
    unsigned char blank;      /* newlines seen behind the mark */
    unsigned char carried;    /* bytes kept from the last read */
    bool pending;             /* a mark was seen, its empty line was not */
    uint64_t sequence, sent;  /* of that mark */
    uint64_t started;
    char carry[CARRY];
};

struct histogram {
    uint64_t counts[BUCKETS];
    uint64_t total, max_ns;
    double sum_ns;
};

static struct sockaddr_in server;
static const char *ready;
static size_t ready_length;
static char *heads;
static char **head;
static size_t head_count;
static int addresses = 8;

static int epoll = -1;
static struct stream *streams;
static size_t capacity, used;
static size_t in_flight, opened, failed, lost;
static int last_status;

static uint64_t delivered, first_ns, last_ns, bytes, reset_ns;
static struct histogram latency, connects;

static uint64_t *records;
static size_t record_capacity, recorded;

static void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec)
           + 1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

/* Latencies */

static void note(struct histogram *histogram, uint64_t ns)
{
    uint64_t us = ns / 1000;
    size_t bucket = us;
    if (us >= SUB) {
        int shift = 63 - __builtin_clzll(us) - 6;
        bucket = (size_t)(shift + 1) * SUB + (size_t)((us >> shift) - SUB);
    }
    if (bucket >= BUCKETS)
        bucket = BUCKETS - 1;
    histogram->counts[bucket]++;
    histogram->total++;
    histogram->sum_ns += (double)ns;
    if (ns > histogram->max_ns)
        histogram->max_ns = ns;
}

/* The upper end of a bucket, in microseconds. */
static double bucket_us(size_t bucket)
{
    if (bucket < SUB)
        return (double)bucket + 1;
    size_t shift = bucket / SUB - 1;
    return (double)((bucket % SUB + SUB + 1) << shift);
}

static void print_histogram(const char *name, const struct histogram *histogram)
{
    printf("\"%s\": {\"count\": %" PRIu64 ", \"mean_us\": %.1f, \"max_us\": %.1f, \"buckets\": [",
           name, histogram->total,
           histogram->total ? histogram->sum_ns / (double)histogram->total / 1000 : 0.0,
           (double)histogram->max_ns / 1000);
    const char *separator = "";
    for (size_t bucket = 0; bucket < BUCKETS; bucket++)
        if (histogram->counts[bucket]) {
            printf("%s[%.0f, %" PRIu64 "]", separator, bucket_us(bucket),
                   histogram->counts[bucket]);
            separator = ", ";
        }
    printf("]}");
}

/* Streams */

static void forget(struct stream *stream)
{
    if (stream->state == OPEN)
        opened--;
    else if (stream->state != FREE)
        in_flight--;
    close(stream->fd);
    stream->state = FREE;
}

static void start(struct stream *stream)
{
    size_t index = (size_t)(stream - streams);
    int one = 1;
    memset(stream, 0, sizeof *stream);
    stream->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (stream->fd < 0)
        die("socket (is the limit of open files high enough?)");
    setsockopt(stream->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (addresses > 0) {
        struct sockaddr_in client = {.sin_family = AF_INET};
        client.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + (uint32_t)(index % (size_t)addresses));
        setsockopt(stream->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
        if (bind(stream->fd, (struct sockaddr *)&client, sizeof client) < 0)
            die("bind");
    }
    stream->started = now_ns();
    stream->state = CONNECTING;
    in_flight++;
    if (connect(stream->fd, (struct sockaddr *)&server, sizeof server) < 0
        && errno != EINPROGRESS) {
        failed++;
        forget(stream);
        return;
    }
    struct epoll_event event = {.events = EPOLLOUT | EPOLLIN, .data.u64 = index};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, stream->fd, &event) < 0)
        die("epoll_ctl");
}

static void send_head(struct stream *stream)
{
    size_t index = (size_t)(stream - streams);
    const char *text = head[index % head_count];
    size_t length = strlen(text);
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(stream->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    /* A head is far smaller than an empty socket buffer. */
    if (error || send(stream->fd, text, length, MSG_NOSIGNAL) != (ssize_t)length) {
        failed++;
        forget(stream);
        return;
    }
    stream->state = OPENING;
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = index};
    epoll_ctl(epoll, EPOLL_CTL_MOD, stream->fd, &event);
}

static void arrived(struct stream *stream, uint64_t now)
{
    stream->pending = false;
    if (stream->sent < reset_ns)
        return; /* a straggler of the measurement before */
    if (!delivered++)
        first_ns = now;
    last_ns = now;
    note(&latency, now > stream->sent ? now - stream->sent : 0);
    if (recorded < record_capacity) {
        records[2 * recorded] = stream->sequence;
        records[2 * recorded + 1] = now;
        recorded++;
    }
}

/* Read a mark that begins at `at`. Returns what follows it; `at` itself if it is not all there;
 * NULL if it is none. */
static const char *mark(struct stream *stream, const char *at, const char *end)
{
    uint64_t numbers[2] = {0, 0};
    const char *p = at + 1;
    for (int i = 0; i < 2; i++) {
        const char *digits = p;
        for (; p < end && *p >= '0' && *p <= '9'; p++)
            numbers[i] = numbers[i] * 10 + (uint64_t)(*p - '0');
        if (p == end)
            return end - at < CARRY ? at : NULL;
        if (p == digits || *p != (i ? '@' : '.'))
            return NULL;
        p++;
    }
    stream->sequence = numbers[0];
    stream->sent = numbers[1];
    stream->pending = true;
    stream->blank = 0;
    return p;
}

static void scan(struct stream *stream, const char *data, size_t length, uint64_t now)
{
    const char *p = data, *end = data + length;
    stream->carried = 0;
    while (p < end) {
        if (stream->pending) {
            for (; p < end; p++) {
                if (*p == '\n') {
                    if (++stream->blank == 2)
                        break;
                } else if (*p != '\r') {
                    stream->blank = 0;
                }
            }
            if (p == end)
                return;
            p++;
            arrived(stream, now);
            continue;
        }
        p = memchr(p, '@', (size_t)(end - p));
        if (p == NULL)
            return;
        const char *after = mark(stream, p, end);
        if (after == p) {
            stream->carried = (unsigned char)(end - p);
            memcpy(stream->carry, p, (size_t)(end - p));
            return;
        }
        p = after == NULL ? p + 1 : after;
    }
}

static void receive(struct stream *stream)
{
    static char buffer[CARRY + BUFFER];
    size_t kept = stream->carried;
    memcpy(buffer, stream->carry, kept);
    ssize_t got = recv(stream->fd, buffer + kept, BUFFER, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        if (stream->state == OPEN)
            lost++;
        else
            failed++;
        forget(stream);
        return;
    }
    bytes += (uint64_t)got;
    uint64_t now = now_ns();
    size_t length = kept + (size_t)got;
    if (stream->state == OPEN) {
        scan(stream, buffer, length, now);
        return;
    }
    /* The first bytes are the status line; no server sends less than that at once. */
    if (!stream->blank) {
        stream->blank = 1;
        if (length >= 12)
            last_status = atoi(buffer + 9);
        if (length < 12 || last_status != 200) {
            failed++;
            forget(stream);
            return;
        }
    }
    char *found = memmem(buffer, length, ready, ready_length);
    if (found == NULL) {
        size_t keep = ready_length - 1 < length ? ready_length - 1 : length;
        memcpy(stream->carry, buffer + length - keep, keep);
        stream->carried = (unsigned char)keep;
        return;
    }
    note(&connects, now - stream->started);
    stream->state = OPEN;
    stream->carried = 0;
    in_flight--;
    opened++;
    found += ready_length;
    scan(stream, found, length - (size_t)(found - buffer), now);
}

static void poll_once(int timeout_ms)
{
    static struct epoll_event events[BATCH];
    int count = epoll_wait(epoll, events, BATCH, timeout_ms);
    if (count < 0 && errno != EINTR)
        die("epoll_wait");
    for (int i = 0; i < count; i++) {
        if (events[i].data.u64 == UINT64_MAX)
            continue; /* a command waits on stdin */
        struct stream *stream = &streams[events[i].data.u64];
        if (stream->state == CONNECTING)
            send_head(stream);
        else if (stream->state != FREE)
            receive(stream);
    }
}

static int left_ms(uint64_t deadline)
{
    uint64_t now = now_ns();
    return now >= deadline ? 0 : (int)((deadline - now) / 1000000) + 1;
}

/* Commands */

static void command_open(size_t count, size_t at_once, uint64_t timeout_ms)
{
    uint64_t begun = now_ns(), deadline = begun + timeout_ms * 1000000;
    double cpu = cpu_seconds();
    size_t next = 0, before = opened;
    if (count > capacity) {
        streams = realloc(streams, count * sizeof *streams);
        if (streams == NULL)
            die("realloc");
        memset(streams + capacity, 0, (count - capacity) * sizeof *streams);
        capacity = count;
    }
    if (count > used)
        used = count;
    memset(&connects, 0, sizeof connects);
    failed = 0;
    while (opened < count && now_ns() < deadline) {
        /* Those that failed are not tried again: the answer says how many. */
        for (; in_flight < at_once && next < count; next++)
            if (streams[next].state == FREE)
                start(&streams[next]);
        if (!in_flight)
            break;
        poll_once(left_ms(deadline));
    }
    uint64_t took = now_ns() - begun;
    for (size_t i = 0; i < used; i++)
        if (streams[i].state == CONNECTING || streams[i].state == OPENING) {
            failed++;
            forget(&streams[i]);
        }
    printf("{\"open\": %zu, \"opened\": %zu, \"failed\": %zu, \"status\": %d, \"seconds\": %.6f, "
           "\"cpu_seconds\": %.6f, ",
           opened, opened - before, failed, last_status, (double)took / 1e9, cpu_seconds() - cpu);
    print_histogram("connects", &connects);
    printf("}\n");
}

static void command_wait(uint64_t total, uint64_t timeout_ms)
{
    uint64_t deadline = now_ns() + timeout_ms * 1000000;
    while (delivered < total && now_ns() < deadline)
        poll_once(left_ms(deadline));
    printf("{\"delivered\": %" PRIu64 ", \"first_ns\": %" PRIu64 ", \"last_ns\": %" PRIu64 "}\n",
           delivered, first_ns, last_ns);
}

static void command_reset(void)
{
    delivered = first_ns = last_ns = bytes = 0;
    lost = 0;
    reset_ns = now_ns();
    recorded = record_capacity = 0;
    memset(&latency, 0, sizeof latency);
    printf("{}\n");
}

static void command_record(size_t count)
{
    records = realloc(records, 16 * (count ? count : 1));
    if (records == NULL)
        die("realloc");
    record_capacity = count;
    recorded = 0;
    printf("{}\n");
}

static void command_dump(const char *path)
{
    FILE *file = fopen(path, "wb");
    if (file == NULL || fwrite(records, 16, recorded, file) != recorded || fclose(file))
        die(path);
    printf("{\"recorded\": %zu}\n", recorded);
}

static void command_stats(void)
{
    printf("{\"open\": %zu, \"lost\": %zu, \"delivered\": %" PRIu64 ", \"bytes\": %" PRIu64
           ", \"first_ns\": %" PRIu64 ", \"last_ns\": %" PRIu64 ", \"cpu_seconds\": %.6f, ",
           opened, lost, delivered, bytes, first_ns, last_ns, cpu_seconds());
    print_histogram("latency", &latency);
    printf("}\n");
}

static void command_close(size_t count)
{
    for (size_t i = count; i < used; i++)
        if (streams[i].state != FREE)
            forget(&streams[i]);
    if (count < used)
        used = count;
    printf("{}\n");
}

static void command(char *line)
{
    char word[16] = "", path[LINE] = "";
    uint64_t a = 0, b = 0, c = 0;
    sscanf(line, "%15s %" SCNu64 " %" SCNu64 " %" SCNu64, word, &a, &b, &c);
    if (!strcmp(word, "open"))
        command_open(a, b, c);
    else if (!strcmp(word, "wait"))
        command_wait(a, b);
    else if (!strcmp(word, "reset"))
        command_reset();
    else if (!strcmp(word, "record"))
        command_record(a);
    else if (!strcmp(word, "dump") && sscanf(line, "%*s %4095[^\n]", path) == 1)
        command_dump(path);
    else if (!strcmp(word, "stats"))
        command_stats();
    else if (!strcmp(word, "close"))
        command_close(a);
    else
        printf("{\"error\": \"no such command\"}\n");
    fflush(stdout);
}

static void read_heads(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) < 0)
        die(path);
    long size = ftell(file);
    rewind(file);
    heads = malloc((size_t)size + 1);
    if (heads == NULL || fread(heads, 1, (size_t)size, file) != (size_t)size)
        die(path);
    fclose(file);
    heads[size] = '\0';
    for (long i = 0; i < size; i++)
        head_count += heads[i] == '\0';
    head = calloc(head_count + 1, sizeof *head);
    if (head == NULL || head_count == 0)
        die("no heads of requests");
    char *p = heads;
    for (size_t i = 0; i < head_count; i++, p += strlen(p) + 1)
        head[i] = p;
}

int main(int argc, char **argv)
{
    if (argc < 5) {
        fprintf(stderr, "usage: load HOST PORT READY HEADS [CLIENT_ADDRESSES]\n");
        return 2;
    }
    server.sin_family = AF_INET;
    server.sin_port = htons((uint16_t)atoi(argv[2]));
    if (inet_pton(AF_INET, argv[1], &server.sin_addr) != 1) {
        fprintf(stderr, "load: %s is no IPv4 address\n", argv[1]);
        return 2;
    }
    ready = strcmp(argv[3], "head") ? argv[3] : "\r\n\r\n";
    ready_length = strlen(ready);
    if (ready_length < 1 || ready_length > CARRY) {
        fprintf(stderr, "load: READY has 1 to %d bytes\n", CARRY);
        return 2;
    }
    read_heads(argv[4]);
    if (argc > 5)
        addresses = atoi(argv[5]);

    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);

    epoll = epoll_create1(EPOLL_CLOEXEC);
    fcntl(STDIN_FILENO, F_SETFL, fcntl(STDIN_FILENO, F_GETFL) | O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = UINT64_MAX};
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, STDIN_FILENO, &event) < 0)
        die("epoll");

    char line[LINE];
    size_t length = 0;
    for (;;) {
        ssize_t got = read(STDIN_FILENO, line + length, sizeof line - 1 - length);
        if (got == 0)
            return 0; /* whoever started us has gone */
        if (got > 0) {
            length += (size_t)got;
            line[length] = '\0';
            char *newline;
            while ((newline = strchr(line, '\n')) != NULL) {
                *newline = '\0';
                command(line);
                length -= (size_t)(newline + 1 - line);
                memmove(line, newline + 1, length + 1);
            }
        }
        poll_once(-1);
    }
}
