// A hub with nothing but Go's standard library.
//
// The design that nearly all examples share ("Writing a Server Sent Events server in Go", Ismael
// Celis, and the hub of gorilla/websocket's chat): a goroutine and a buffered channel per stream; the
// event is formatted once; a stream whose channel is full is closed, so that it cannot stop the
// others. GOMAXPROCS is as Go sets it: all processors.
//
//	GET  /all, /own/NAME     a stream
//	POST /all, /own/NAME     the body goes to those streams as the data of one event
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"sync"
	"time"
)

const (
	buffered  = 16
	heartbeat = 15 * time.Second
)

type hub struct {
	mutex   sync.Mutex
	lastID  uint64
	streams map[string]map[chan []byte]struct{}
}

func (h *hub) subscribe(topic string) chan []byte {
	stream := make(chan []byte, buffered)
	h.mutex.Lock()
	defer h.mutex.Unlock()
	if h.streams[topic] == nil {
		h.streams[topic] = make(map[chan []byte]struct{})
	}
	h.streams[topic][stream] = struct{}{}
	return stream
}

func (h *hub) unsubscribe(topic string, stream chan []byte) {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	if _, there := h.streams[topic][stream]; there {
		delete(h.streams[topic], stream)
		close(stream)
	}
	if len(h.streams[topic]) == 0 {
		delete(h.streams, topic)
	}
}

func (h *hub) publish(topic string, data []byte) {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	h.lastID++
	event := []byte(fmt.Sprintf("id: %d\nevent: notification\ndata: %s\n\n", h.lastID, data))
	for stream := range h.streams[topic] {
		select {
		case stream <- event:
		default:
			delete(h.streams[topic], stream)
			close(stream)
		}
	}
}

func (h *hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	topic := r.URL.Path
	if r.Method == http.MethodPost {
		data, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		h.publish(topic, data)
		w.WriteHeader(http.StatusNoContent)
		return
	}
	flusher := w.(http.Flusher)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-cache")
	stream := h.subscribe(topic)
	defer h.unsubscribe(topic, stream)
	flusher.Flush()
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	for {
		select {
		case event, open := <-stream:
			if !open {
				return
			}
			if _, err := w.Write(event); err != nil {
				return
			}
		case <-ticker.C:
			if _, err := io.WriteString(w, ": ping\n\n"); err != nil {
				return
			}
		case <-r.Context().Done():
			return
		}
		flusher.Flush()
	}
}

func main() {
	h := &hub{streams: make(map[string]map[chan []byte]struct{})}
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], h))
}
