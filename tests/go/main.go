// A participant on LiveKit's Go SDK, as witness: what it publishes others must receive, and what
// others publish it must receive. It says "ready" when it is in its room and publishes, stays until
// its standard input ends, and then prints what it got as one JSON object. tests/live/go_sdk.rs
// builds and runs it.
//
//	LIVEKIT_TOKEN=.. witness -url ws://127.0.0.1:7880 -video q.ivf,h.ivf,f.ivf -audio a.ogg -data
//
// With -single it has one connection, as the SDK's WithSinglePeerConnection makes it; without, two.
// LIVEKIT_TOKEN names its room and itself. Exit code 0: it was in the room all the time.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/livekit/protocol/livekit"
	lksdk "github.com/livekit/server-sdk-go/v2"
	"github.com/pion/rtcp"
	"github.com/pion/rtp/codecs"
	"github.com/pion/webrtc/v4"
	"github.com/pion/webrtc/v4/pkg/media"
	"github.com/pion/webrtc/v4/pkg/media/ivfreader"
	"github.com/pion/webrtc/v4/pkg/media/oggreader"
)

const (
	opusFrame = 20 * time.Millisecond
	opusRate  = 48_000
	// A viewer without a picture asks for one so often.
	keyFrameRequests = 500 * time.Millisecond
	dataInterval     = 100 * time.Millisecond
	// Whoever forgets us finds us gone.
	stayMax = 2 * time.Minute
)

// What one subscribed track brought.
type receivedTrack struct {
	Sid         string `json:"sid"`
	Participant string `json:"participant"`
	Kind        string `json:"kind"`
	Codec       string `json:"codec"`
	Packets     int    `json:"packets"`
	Lost        int    `json:"lost"`
	Frames      int    `json:"frames"`
	KeyFrames   int    `json:"key_frames"`
}

// Whose data came; the topic says on which channel it was sent.
type receivedData struct {
	Participant string `json:"participant"`
	Topic       string `json:"topic"`
	Packets     int    `json:"packets"`
	OutOfOrder  int    `json:"out_of_order"`
	next        int
}

type report struct {
	// Tracks of others that the server told of.
	Announced int `json:"announced"`
	// What did not work, in the SDK's words.
	Failed       []string         `json:"failed"`
	Disconnected string           `json:"disconnected"`
	Tracks       []*receivedTrack `json:"tracks"`
	// By sender and topic.
	Data     map[string]*receivedData `json:"data"`
	DataSent map[string]int           `json:"data_sent"`
}

type witness struct {
	lock   sync.Mutex
	report report
	over   bool
}

func main() {
	url := flag.String("url", "", "the server, ws://HOST:PORT")
	single := flag.Bool("single", false, "one connection instead of two")
	video := flag.String("video", "", "IVF files of VP8, one a layer, from low to high")
	audio := flag.String("audio", "", "an Ogg file of Opus in packets of 20 ms")
	data := flag.Bool("data", false, "send data packets, reliable and lossy")
	flag.Parse()
	if err := run(*url, *single, *video, *audio, *data); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(url string, single bool, video, audio string, data bool) error {
	w := &witness{}
	w.report.Failed = []string{}
	w.report.Tracks = []*receivedTrack{}
	w.report.Data = map[string]*receivedData{}
	w.report.DataSent = map[string]int{}
	options := []lksdk.ConnectOption{lksdk.WithDisableRegionDiscovery()}
	if single {
		options = append(options, lksdk.WithSinglePeerConnection())
	}
	room, err := lksdk.ConnectToRoomWithToken(url, os.Getenv("LIVEKIT_TOKEN"), w.callbacks(), options...)
	if err != nil {
		return fmt.Errorf("joining: %w", err)
	}
	stop := make(chan struct{})
	if video != "" {
		if err := publishVideo(room, strings.Split(video, ",")); err != nil {
			return fmt.Errorf("publishing video: %w", err)
		}
	}
	if audio != "" {
		if err := publishAudio(room, audio); err != nil {
			return fmt.Errorf("publishing audio: %w", err)
		}
	}
	sent := make(chan error, 1)
	if data {
		go func() { sent <- w.sendData(room, stop) }()
	} else {
		sent <- nil
	}
	fmt.Println("ready")
	left := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(left)
	}()
	select {
	case <-left:
	case <-time.After(stayMax):
	}
	close(stop)
	select {
	case err := <-sent:
		if err != nil {
			w.locked(func() { w.report.Failed = append(w.report.Failed, "data: "+err.Error()) })
		}
	case <-time.After(time.Second):
		w.locked(func() { w.report.Failed = append(w.report.Failed, "data: the channels did not open") })
	}
	w.locked(func() { w.over = true })
	room.Disconnect()
	w.lock.Lock()
	defer w.lock.Unlock()
	if err := json.NewEncoder(os.Stdout).Encode(&w.report); err != nil {
		return err
	}
	if w.report.Disconnected != "" {
		return errors.New("sent away: " + w.report.Disconnected)
	}
	return nil
}

func (w *witness) locked(act func()) {
	w.lock.Lock()
	defer w.lock.Unlock()
	act()
}

func (w *witness) callbacks() *lksdk.RoomCallback {
	return &lksdk.RoomCallback{
		OnDisconnectedWithReason: func(reason lksdk.DisconnectionReason) {
			w.locked(func() {
				if !w.over {
					w.report.Disconnected = string(reason)
				}
			})
		},
		ParticipantCallback: lksdk.ParticipantCallback{
			OnTrackPublished: func(*lksdk.RemoteTrackPublication, *lksdk.RemoteParticipant) {
				w.locked(func() { w.report.Announced++ })
			},
			OnTrackSubscribed: w.receive,
			OnTrackSubscriptionFailed: func(sid string, _ *lksdk.RemoteParticipant) {
				w.locked(func() { w.report.Failed = append(w.report.Failed, sid) })
			},
			OnDataPacket: w.receiveData,
		},
	}
}

// Reads a track until it ends.
func (w *witness) receive(track *webrtc.TrackRemote, publication *lksdk.RemoteTrackPublication, from *lksdk.RemoteParticipant) {
	received := &receivedTrack{
		Sid:         publication.SID(),
		Participant: from.Identity(),
		Kind:        track.Kind().String(),
		Codec:       track.Codec().MimeType,
	}
	w.locked(func() {
		w.report.Tracks = append(w.report.Tracks, received)
	})
	if track.Kind() == webrtc.RTPCodecTypeVideo {
		go w.askForPicture(track, from, received)
	}
	go w.count(track, received)
}

func (w *witness) askForPicture(track *webrtc.TrackRemote, from *lksdk.RemoteParticipant, received *receivedTrack) {
	for range 20 {
		time.Sleep(keyFrameRequests)
		seen := false
		w.locked(func() { seen = received.KeyFrames > 0 || w.over })
		if seen {
			return
		}
		from.WritePLI(track.SSRC())
	}
}

func (w *witness) count(track *webrtc.TrackRemote, received *receivedTrack) {
	var lowest, highest uint64
	seen := map[uint64]struct{}{}
	for {
		packet, _, err := track.ReadRTP()
		if err != nil {
			return
		}
		if len(packet.Payload) == 0 {
			continue
		}
		number := uint64(packet.SequenceNumber)
		if len(seen) == 0 {
			// Far from zero, so that an earlier packet does not run below it.
			number += 1 << 32
			lowest, highest = number, number
		} else {
			number = highest + uint64(int64(int16(packet.SequenceNumber-uint16(highest))))
		}
		if _, twice := seen[number]; twice {
			continue
		}
		seen[number] = struct{}{}
		lowest, highest = min(lowest, number), max(highest, number)
		w.locked(func() {
			received.Packets = len(seen)
			received.Lost = int(highest-lowest+1) - len(seen)
			if track.Kind() == webrtc.RTPCodecTypeAudio || packet.Marker {
				received.Frames++
			}
			if track.Codec().MimeType == webrtc.MimeTypeVP8 && startsKeyFrame(packet.Payload) {
				received.KeyFrames++
			}
		})
	}
}

func startsKeyFrame(payload []byte) bool {
	var vp8 codecs.VP8Packet
	frame, err := vp8.Unmarshal(payload)
	return err == nil && vp8.S == 1 && vp8.PID == 0 && len(frame) > 0 && frame[0]&1 == 0
}

// ---- Publishing ----

func publishVideo(room *lksdk.Room, files []string) error {
	qualities := []livekit.VideoQuality{livekit.VideoQuality_LOW, livekit.VideoQuality_MEDIUM, livekit.VideoQuality_HIGH}
	if len(files) > len(qualities) {
		return errors.New("more than three layers")
	}
	var tracks []*lksdk.LocalTrack
	for index, file := range files {
		frames, header, err := readIvf(file)
		if err != nil {
			return err
		}
		layer := &livekit.VideoLayer{
			Quality: qualities[index],
			Width:   uint32(header.Width),
			Height:  uint32(header.Height),
		}
		provider := &videoProvider{frames: frames, frame: time.Second * time.Duration(header.TimebaseNumerator) / time.Duration(header.TimebaseDenominator)}
		options := []lksdk.LocalTrackOptions{lksdk.WithRTCPHandler(provider.handleRtcp)}
		if len(files) > 1 {
			options = append(options, lksdk.WithSimulcast("video", layer))
		}
		track, err := lksdk.NewLocalTrack(webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeVP8, ClockRate: 90_000}, options...)
		if err != nil {
			return err
		}
		if err := track.StartWrite(provider, nil); err != nil {
			return err
		}
		tracks = append(tracks, track)
	}
	var err error
	if len(tracks) > 1 {
		_, err = room.LocalParticipant.PublishSimulcastTrack(tracks, &lksdk.TrackPublicationOptions{Name: "camera"})
	} else {
		_, err = room.LocalParticipant.PublishTrack(tracks[0], &lksdk.TrackPublicationOptions{Name: "camera"})
	}
	return err
}

func publishAudio(room *lksdk.Room, file string) error {
	packets, err := readOgg(file)
	if err != nil {
		return err
	}
	track, err := lksdk.NewLocalTrack(webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeOpus, ClockRate: opusRate, Channels: 2})
	if err != nil {
		return err
	}
	if err := track.StartWrite(&audioProvider{packets: packets}, nil); err != nil {
		return err
	}
	_, err = room.LocalParticipant.PublishTrack(track, &lksdk.TrackPublicationOptions{Name: "microphone"})
	return err
}

// Frames in a circle. The first is a key frame, and whoever asks for one gets it: the circle begins
// anew.
type videoProvider struct {
	lksdk.BaseSampleProvider
	lock   sync.Mutex
	frames [][]byte
	frame  time.Duration
	next   int
}

func (p *videoProvider) NextSample(context.Context) (media.Sample, error) {
	p.lock.Lock()
	defer p.lock.Unlock()
	sample := media.Sample{Data: p.frames[p.next], Duration: p.frame}
	p.next = (p.next + 1) % len(p.frames)
	return sample, nil
}

func (p *videoProvider) handleRtcp(packet rtcp.Packet) {
	switch packet.(type) {
	case *rtcp.PictureLossIndication, *rtcp.FullIntraRequest:
		p.lock.Lock()
		p.next = 0
		p.lock.Unlock()
	}
}

type audioProvider struct {
	lksdk.BaseSampleProvider
	packets [][]byte
	next    int
}

func (p *audioProvider) NextSample(context.Context) (media.Sample, error) {
	sample := media.Sample{Data: p.packets[p.next], Duration: opusFrame}
	p.next = (p.next + 1) % len(p.packets)
	return sample, nil
}

func readIvf(file string) ([][]byte, *ivfreader.IVFFileHeader, error) {
	opened, err := os.Open(file)
	if err != nil {
		return nil, nil, err
	}
	defer opened.Close()
	reader, header, err := ivfreader.NewWith(opened)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", file, err)
	}
	var frames [][]byte
	for {
		frame, _, err := reader.ParseNextFrame()
		if errors.Is(err, io.EOF) && len(frames) > 0 {
			return frames, header, nil
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", file, err)
		}
		frames = append(frames, frame)
	}
}

// A page of ours has one packet: ffmpeg writes such with -page_duration.
func readOgg(file string) ([][]byte, error) {
	opened, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	reader, _, err := oggreader.NewWith(opened)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var packets [][]byte
	for {
		page, _, err := reader.ParseNextPage()
		if errors.Is(err, io.EOF) && len(packets) > 0 {
			return packets, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if strings.HasPrefix(string(page), "OpusTags") {
			continue
		}
		packets = append(packets, page)
	}
}

// ---- Data ----

func (w *witness) sendData(room *lksdk.Room, stop <-chan struct{}) error {
	for number := 0; ; number++ {
		for _, topic := range []string{"reliable", "lossy"} {
			err := room.LocalParticipant.PublishDataPacket(
				lksdk.UserData([]byte(fmt.Sprint(number))),
				lksdk.WithDataPublishReliable(topic == "reliable"),
				lksdk.WithDataPublishTopic(topic),
			)
			if err != nil {
				return err
			}
			w.locked(func() { w.report.DataSent[topic]++ })
		}
		select {
		case <-stop:
			return nil
		case <-time.After(dataInterval):
		}
	}
}

func (w *witness) receiveData(data lksdk.DataPacket, params lksdk.DataReceiveParams) {
	user, ok := data.(*lksdk.UserDataPacket)
	if !ok {
		return
	}
	number := -1
	_, _ = fmt.Sscan(string(user.Payload), &number)
	w.locked(func() {
		key := params.SenderIdentity + " " + user.Topic
		received := w.report.Data[key]
		if received == nil {
			received = &receivedData{Participant: params.SenderIdentity, Topic: user.Topic}
			w.report.Data[key] = received
		}
		received.Packets++
		if number < received.next {
			received.OutOfOrder++
		}
		received.next = number + 1
	})
}
